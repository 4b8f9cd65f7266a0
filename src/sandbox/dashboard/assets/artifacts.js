// Previews of artifacts: images as images, Markdown as Markdown, everything else as text if it is text.
import { ask, h, size } from "/assets/page.js";
import { markdown } from "/assets/markdown.js";
import { put } from "/assets/plain.js";

const BYTES_MAX = 256 * 1024;
const IMAGES = new Set(["image/png", "image/jpeg", "image/gif", "image/webp", "image/svg+xml", "image/avif"]);
const SUFFIXES = { png: "image/png", jpg: "image/jpeg", jpeg: "image/jpeg", gif: "image/gif", webp: "image/webp" };

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-preview]");
  if (!button) return;
  const place = button.closest("li").querySelector(".preview");
  const isOpen = button.getAttribute("aria-expanded") === "true";
  button.setAttribute("aria-expanded", String(!isOpen));
  place.hidden = isOpen;
  if (isOpen || place.childElementCount) return;
  try {
    place.replaceChildren(...(await preview(button)));
  } catch (error) {
    place.replaceChildren(h("p", { class: "muted" }, error.message));
  }
});

async function preview(button) {
  const { preview: address, type, size: bytes } = button.dataset;
  const name = button.textContent;
  const kind = type.split(";")[0];
  if (IMAGES.has(kind)) return [await image(address, kind, name)];
  if (Number(bytes) === 0) return [h("p", { class: "muted" }, "An empty file.")];
  const suffix = SUFFIXES[name.split(".").pop().toLowerCase()];
  if (suffix) return [await image(address, suffix, name)];
  const answer = await ask(address, { headers: { range: `bytes=0-${BYTES_MAX - 1}` } });
  const text = new TextDecoder().decode(await answer.arrayBuffer());
  if (text.slice(0, 4096).includes("\0")) return [h("p", { class: "muted" }, "A binary file; download it to look inside.")];
  const shown = /\.(md|markdown)$/i.test(name) || type.startsWith("text/markdown") ? markdown(text) : put(h("pre", { tabindex: "0" }), text);
  const more = Number(bytes) > BYTES_MAX ? h("p", { class: "muted" }, `The first ${size(BYTES_MAX)} of ${size(Number(bytes))}.`) : null;
  return more ? [more, shown] : [shown];
}

// The server lets no page load an artifact as an image, since an SVG is also a document: its bytes are fetched.
async function image(address, type, name) {
  const blob = new Blob([await (await ask(address)).arrayBuffer()], { type });
  const reader = new FileReader();
  await new Promise((done, failed) => {
    reader.onload = done;
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  });
  return h("img", { src: reader.result, alt: name });
}
