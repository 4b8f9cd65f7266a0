// Previews of artifacts: raster images, Markdown and other text. An SVG is shown as text, because a small one with
// nested references can draw any number of shapes and make the page unresponsive.

import { markdown } from "/assets/markdown.js";
import { h, request, size } from "/assets/page.js";
import { appendText } from "/assets/untrusted_text.js";

const BYTES_MAX = 256 * 1024;
const IMAGE_BYTES_MAX = 16 * 1024 * 1024;
const IMAGES = new Set(["image/png", "image/jpeg", "image/gif", "image/webp", "image/avif"]);
const SUFFIXES = { png: "image/png", jpg: "image/jpeg", jpeg: "image/jpeg", gif: "image/gif", webp: "image/webp" };

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-preview]");
  if (!button) return;
  const container = button.closest("li").querySelector(".preview");
  const isOpen = button.getAttribute("aria-expanded") === "true";
  button.setAttribute("aria-expanded", String(!isOpen));
  container.hidden = isOpen;
  if (isOpen || container.childElementCount) return;
  try {
    container.replaceChildren(...(await preview(button)));
  } catch (error) {
    container.replaceChildren(h("p", { class: "muted" }, error.message));
  }
});

async function preview(button) {
  const { preview: url, type, size: bytes } = button.dataset;
  const name = button.textContent;
  const kind = type.split(";")[0];
  if (Number(bytes) === 0) return [h("p", { class: "muted" }, "This file is empty.")];
  const imageType = IMAGES.has(kind) ? kind : SUFFIXES[name.split(".").pop().toLowerCase()];
  if (imageType && Number(bytes) > IMAGE_BYTES_MAX)
    return [h("p", { class: "muted" }, `This image is larger than ${size(IMAGE_BYTES_MAX)}; download it to view it.`)];
  if (imageType) return [await image(url, imageType, name)];
  const response = await request(url, { headers: { range: `bytes=0-${BYTES_MAX - 1}` } });
  const text = new TextDecoder().decode(await response.arrayBuffer());
  if (text.slice(0, 4096).includes("\0"))
    return [h("p", { class: "muted" }, "This is a binary file; download it to view it.")];
  const content =
    /\.(md|markdown)$/i.test(name) || type.startsWith("text/markdown")
      ? markdown(text)
      : appendText(h("pre", { tabindex: "0" }), text);
  const more =
    Number(bytes) > BYTES_MAX
      ? h("p", { class: "muted" }, `Only the first ${size(BYTES_MAX)} of ${size(Number(bytes))} are shown.`)
      : null;
  return more ? [more, content] : [content];
}

// Fetch the bytes: the Content Security Policy does not allow artifacts as image sources.
async function image(url, type, name) {
  const blob = new Blob([await (await request(url)).arrayBuffer()], { type });
  const reader = new FileReader();
  await new Promise((done, failed) => {
    reader.onload = done;
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  });
  return h("img", { src: reader.result, alt: name });
}
