// The form for a manifest: shows values from the YAML, and writes the user's changes back to it.
import { ManifestDocument, toNumber } from "/assets/manifest_document.js";
import { $, h } from "/assets/page.js";

const COMMON_SECTIONS = ["version", "kind", "metadata", "repository", "vm", "secrets", "lifecycle"];
const SECRET_FIELDS = ["name", "source", "key"];
const SECRET_SOURCES = ["env", "file", "vault"];
const NAME = ["metadata", "name"];
const NAME_LENGTH_MAX = 120;
const OTHERS_MAX = 12;
const GITHUB_NAME = /^[a-z\d][a-z\d-]*\/(?!\.+$)[\w.-]+$/i;
const TYPED_KINDS = ["lines", "labels", "repository"]; // their text may differ from the YAML while the user types

const linesOf = (text) => text.split("\n").flatMap((line) => line.trim() || []);

// Convert OWNER/NAME to the URL of a recent repository with this name, otherwise to a GitHub URL. NAME becomes the URL
// of the only recent repository with this name.
function repositoryUrl(text) {
  const name = text.trim();
  const recent = [...$("repositories").options];
  const sameName = name ? recent.filter((option) => option.textContent.split("/").at(-1) === name) : [];
  const match = recent.find((option) => option.textContent === name) ?? (sameName.length === 1 ? sameName[0] : null);
  return match?.value ?? (GITHUB_NAME.test(name) ? `https://github.com/${name}` : text);
}

// The form's own message about an invalid value; undefined if the server's message is more precise.
function messageFor({ value, dataset }) {
  if (!value) return dataset.empty;
  return value.includes(":") ? undefined : dataset.incomplete;
}

// The lookbehind lets the search start once for each run of slashes; otherwise, it would take quadratic time.
const withoutSuffix = (url) =>
  url
    .toLowerCase()
    .replace(/(?<!\/)\/+$/, "")
    .replace(/\.git$/, "");

// The branches of recent tasks with this repository. A branch name contains no spaces.
function recentBranches(url) {
  const chosen = withoutSuffix(url);
  const options = [...$("repositories").options].filter((option) => withoutSuffix(option.value) === chosen);
  return new Set(options.flatMap((option) => option.dataset.branches.split(" ")));
}

// For each kind of field, `read` returns the value as text, or null if the form cannot show it. `value` converts the
// text for the YAML.
const KINDS = {
  text: { read: (manifest, path) => manifest.readText(path), value: (text) => text },
  number: { read: (manifest, path) => manifest.readText(path), value: toNumber },
  boolean: { read: (manifest, path) => manifest.readText(path), value: (text) => text && text === "true" },
  repository: { read: (manifest, path) => manifest.readText(path), value: repositoryUrl },
  lines: { read: (manifest, path) => manifest.readList(path)?.join("\n") ?? null, value: linesOf },
  labels: {
    read: (manifest, path) => {
      const labels = manifest.readMap(path);
      return (
        labels &&
        Object.entries(labels)
          .map(([key, value]) => `${key}=${value}`)
          .join("\n")
      );
    },
    value: (text) =>
      Object.fromEntries(
        linesOf(text).map((line) => {
          const [key, ...rest] = line.split("=");
          return [key.trim(), rest.join("=").trim()];
        }),
      ),
  },
};

// Derive a task's name from its prompt, as the server does for a task that continues another one.
export function nameOf(prompt) {
  const line = linesOf(prompt)[0] ?? "";
  const text = line.replace(/^[#*>\-\s]+/, "").replace(/(?<![:\s])[:\s]+$/, ""); // without the lookbehind, this is slow
  const name = text.replace(/[\p{C}\s]+/gu, " ");
  const characters = Array.from(name);
  if (characters.length <= NAME_LENGTH_MAX) return name;
  const space = characters.lastIndexOf(" ", NAME_LENGTH_MAX - 1);
  return `${characters.slice(0, space < 0 ? NAME_LENGTH_MAX - 1 : space).join("")}…`;
}

export class ManifestForm {
  #suggestedFor; // the repository whose branches are suggested

  // agents: the possible keys of the agent section. onchange: called with the new text.
  constructor(panel, agents, onchange) {
    this.fields = [...panel.querySelectorAll("[data-path]")];
    this.agents = agents;
    this.onchange = onchange;
    this.touched = new Set();
    this.secrets = $("secrets");
    for (const field of this.fields) {
      field.addEventListener("input", () => this.#write(field));
      field.addEventListener("blur", () => this.#touch(field));
    }
    $("add-secret").addEventListener("click", () => this.#addSecret());
  }

  // Show the values of this text. A focused field keeps its text.
  show(text) {
    this.manifest = new ManifestDocument(text);
    const { problem } = this.manifest;
    const keys = problem ? [] : this.manifest.keys();
    this.agent = keys.find((key) => this.agents.includes(key));
    for (const field of this.fields) this.#showField(field);
    this.#showBranches();
    this.#showSecrets();
    this.#showNote(keys);
    this.#showSummary();
  }

  // Suggest the branches of the repository.
  #showBranches() {
    const url = this.manifest.problem ? null : this.manifest.readText(["repository", "url"]);
    if (url === this.#suggestedFor) return;
    this.#suggestedFor = url;
    $("branches").replaceChildren(...[...recentBranches(url ?? "")].map((value) => h("option", { value })));
  }

  // Next to the heading of the closed part, show which advanced values are set.
  #showSummary() {
    const fields = this.fields.filter(
      (field) => field.closest("details") && field.value && !("required" in field.dataset),
    );
    const texts = fields.map((field) => {
      const [first, ...rest] = field.value.split("\n");
      return `${field.labels[0].textContent} ${first}${rest.length ? " …" : ""}`;
    });
    const secrets = this.secrets.children.length;
    if (secrets) texts.push(secrets === 1 ? "1 secret" : `${secrets} secrets`);
    const summary = $("advanced-summary");
    summary.dataset.initial ??= summary.textContent;
    summary.textContent = texts.length ? texts.join(", ") : summary.dataset.initial;
  }

  value(path) {
    return this.fields.find((field) => field.dataset.path === path).value;
  }

  set(path, text) {
    const field = this.fields.find((each) => each.dataset.path === path);
    if (field.disabled) return;
    field.value = text;
    this.#write(field);
  }

  // Whether the error is about an empty field that the user has not filled in yet.
  isUntouched(name) {
    const element = this.#elementOf(name);
    return element !== null && element !== undefined && !element.value && !this.touched.has(element.dataset.path);
  }

  // Whether the error is about a field in the closed part of the form.
  isFolded(name) {
    return Boolean(this.#elementOf(name)?.closest("details:not([open])"));
  }

  // Show these errors at their fields; those of untouched fields only if `all`. Return the errors without a field.
  showErrors(errors, all) {
    const messages = new Map();
    const others = [];
    for (const error of errors) {
      const element = this.#elementOf(error.field);
      if (!element) others.push(error);
      else if ((all || !this.isUntouched(error.field)) && !messages.has(element))
        messages.set(element, messageFor(element) ?? error.message);
    }
    for (const field of this.#elements()) this.#showError(field, messages.get(field));
    return others;
  }

  // The error whose field comes first in the form.
  firstOf(errors) {
    const elements = this.#elements();
    const place = ({ field }) => {
      const at = elements.indexOf(this.#elementOf(field));
      return at < 0 ? elements.length : at;
    };
    return errors.toSorted((one, other) => place(one) - place(other))[0];
  }

  // Focus the field of this error. Return whether there is one.
  goTo(name, { scrolls = true } = {}) {
    const element = this.#elementOf(name);
    if (!element || element.disabled) return false;
    const closed = element.closest("details:not([open])");
    if (closed) closed.open = true;
    element.focus({ preventScroll: !scrolls });
    // The message is below the field, and the browser would scroll only to the field.
    if (scrolls) element.closest(".field, .secret").scrollIntoView({ block: "nearest" });
    return true;
  }

  #elements() {
    return [...this.fields, ...this.secrets.querySelectorAll("[data-path]")];
  }

  #path(field) {
    const parts = field.dataset.path.split(".");
    return parts[0] === "agent" ? [this.agent, ...parts.slice(1)] : parts;
  }

  // The element of the field, of its longest parent, or of its first child.
  #elementOf(name) {
    const own = this.agent && (name === this.agent || name.startsWith(`${this.agent}.`)) ? this.agent : null;
    const path = own ? `agent${name.slice(own.length)}` : name;
    if (!path || this.manifest.problem) return null;
    const isInside = (outer, inner) =>
      inner === outer || inner.startsWith(`${outer}.`) || inner.startsWith(`${outer}[`);
    const elements = this.#elements();
    return (
      elements.find((element) => isInside(element.dataset.path, path)) ??
      (own ? null : elements.find((element) => isInside(path, element.dataset.path)))
    );
  }

  #showField(field) {
    const path = this.#path(field);
    const isUsable = !this.manifest.problem && path[0] !== undefined && this.manifest.isReachable(path);
    const text = isUsable ? KINDS[field.dataset.kind ?? "text"].read(this.manifest, path) : null;
    const isListed = field.tagName !== "SELECT" || [...field.options].some((option) => option.value === text);
    field.disabled = text === null || !isListed;
    field.title =
      field.disabled && !this.manifest.problem ? "The form cannot show this value. Change it in the YAML." : "";
    if (text !== null && isListed && field.value !== text && !this.#isBeingTyped(field, text)) field.value = text;
  }

  // While the user types, the field keeps the typed text. The YAML contains trimmed lines, and the URL of a repository.
  #isBeingTyped(field, text) {
    const kind = field.dataset.kind ?? "text";
    if (document.activeElement !== field || !TYPED_KINDS.includes(kind)) return false;
    return JSON.stringify(KINDS[kind].value(field.value)) === JSON.stringify(KINDS[kind].value(text));
  }

  #showNote(keys) {
    const { problem } = this.manifest;
    const note = $("form-note");
    const sections = keys.filter((key) => !COMMON_SECTIONS.includes(key) && key !== this.agent);
    let text = problem && `${problem} Change it in the YAML; the form is read-only until then.`;
    if (!text && !this.agent)
      text = sections.length
        ? `The form has no fields for the section ${sections.slice(0, 3).join(", ")}. Change it in the YAML.`
        : "The YAML has no agent section. Add one there.";
    note.textContent = text ?? "";
    note.hidden = !text;
    const others = problem ? [] : this.#otherPaths(sections);
    const list = others.slice(0, OTHERS_MAX).join(", ") + (others.length > OTHERS_MAX ? " …" : "");
    $("form-others").textContent = others.length ? `Only in the YAML: ${list}` : "";
  }

  // The fields in the YAML that the form does not have.
  #otherPaths(sections) {
    const known = this.fields.map((field) => this.#path(field).join("."));
    const secrets = this.#readSecrets() === null ? ["secrets"] : [];
    const inside = [...COMMON_SECTIONS.slice(2), this.agent].filter((key) => key && key !== "secrets");
    const paths = inside.flatMap((section) => this.manifest.keys([section]).map((key) => `${section}.${key}`));
    return [...secrets, ...(this.agent ? sections : []), ...paths.filter((path) => !known.includes(path))];
  }

  #touch(field) {
    if (field.value) this.touched.add(field.dataset.path);
    if (field.dataset.kind === "repository") this.#showField(field);
  }

  #write(field) {
    const path = this.#path(field);
    this.touched.add(field.dataset.path);
    const value = KINDS[field.dataset.kind ?? "text"].value(field.value);
    const isEmpty = Array.isArray(value)
      ? !value.length
      : typeof value === "object"
        ? !Object.keys(value).length
        : value === "";
    let text = this.manifest.set(path, isEmpty && !("required" in field.dataset) ? undefined : value);
    if (field.dataset.path === "metadata.name") this.isNamed = true;
    if (field.dataset.path === "agent.prompt" && !this.isNamed && this.manifest.isReachable(NAME)) {
      const name = nameOf(field.value);
      if (name !== this.manifest.readText(NAME)) text = new ManifestDocument(text).set(NAME, name);
    }
    this.#changed(text);
  }

  #changed(text) {
    this.show(text);
    this.onchange(text);
  }

  #showSecrets() {
    const records = this.#readSecrets();
    $("add-secret").disabled = records === null;
    const rows = [...this.secrets.children];
    (records ?? []).forEach((record, at) => {
      const row = rows[at] ?? this.secrets.appendChild(this.#secretRow(at));
      row.querySelector("button").ariaLabel = `Remove secret ${at + 1}`;
      for (const input of row.querySelectorAll("[data-field]")) {
        input.dataset.path = `secrets[${at}].${input.dataset.field}`;
        input.ariaLabel = input.ariaLabel.replace(/(?<!\d)\d+$/, at + 1);
        const text = record[input.dataset.field] ?? "";
        if (input.value !== text) input.value = text;
      }
    });
    for (const row of rows.slice(records?.length ?? 0)) row.remove();
  }

  #readSecrets() {
    const records = this.manifest.problem ? null : this.manifest.readRecords(["secrets"], SECRET_FIELDS);
    return records?.every(({ source = "" }) => source === "" || SECRET_SOURCES.includes(source)) ? records : null;
  }

  #secretRow(at) {
    const control = (field, label, ...options) =>
      h(
        options.length ? "select" : "input",
        {
          "data-path": `secrets[${at}].${field}`,
          "data-field": field,
          "aria-label": `${label} of secret ${at + 1}`,
          placeholder: options.length ? null : label,
          autocomplete: "off",
          spellcheck: "false",
          oninput: () => this.#writeSecrets(),
        },
        ...options.map((option) => h("option", { value: option }, option)),
      );
    const remove = h("button", { type: "button", class: "quiet", "aria-label": `Remove secret ${at + 1}` }, "×");
    const row = h(
      "li",
      { class: "secret" },
      control("name", "Variable"),
      control("source", "Source", ...SECRET_SOURCES),
      control("key", "Key in the source"),
      remove,
    );
    remove.addEventListener("click", () => {
      row.remove();
      this.#writeSecrets();
    });
    return row;
  }

  #addSecret() {
    const row = this.secrets.appendChild(this.#secretRow(this.secrets.children.length));
    this.#writeSecrets();
    row.querySelector("input").focus();
  }

  #writeSecrets() {
    const records = [...this.secrets.children].map((row) =>
      Object.fromEntries([...row.querySelectorAll("[data-field]")].map((input) => [input.dataset.field, input.value])),
    );
    this.#changed(this.manifest.set(["secrets"], records.length ? records : undefined));
  }

  #showError(field, message) {
    const frame = field.closest(".field, .secret");
    const id = `error-${field.dataset.path.replace(/\W/g, "-")}`;
    const hint = field.id && $(`${field.id}-hint`);
    const descriptions = [message && id, hint?.id].filter(Boolean);
    if (descriptions.length) field.setAttribute("aria-describedby", descriptions.join(" "));
    else field.removeAttribute("aria-describedby");
    const name = field.dataset.field ?? "";
    let text = frame.querySelector(`.field-error[data-of="${name}"]`);
    if (!message) {
      text?.remove();
      field.removeAttribute("aria-invalid");
      return;
    }
    if (!text) text = frame.appendChild(h("p", { class: "field-error", "data-of": name }));
    text.id = id;
    // The controls of a secret share a row, so the message names its control.
    const shown = name && field.placeholder ? `${field.placeholder} ${message}` : message;
    if (text.textContent !== shown) text.textContent = shown;
    field.setAttribute("aria-invalid", "true");
  }
}
