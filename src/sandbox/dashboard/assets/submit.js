// The page for a new task: a form and the YAML of one manifest. The server validates it while the user types.
import { ManifestDocument } from "/assets/manifest_document.js";
import { ManifestEditor } from "/assets/manifest_editor.js";
import { ManifestForm } from "/assets/manifest_form.js";
import { $, h, request, toast, withCode } from "/assets/page.js";

const PAUSE_MILLISECONDS = 250;
const TASKS = "/api/v1/tasks";
const DRAFT = `draft of ${location.pathname}${location.search}`;
const LAST_REPOSITORY = "sandbox.repository"; // the repository of the last task from this browser
const YAML = { "content-type": "application/yaml" };
const TABS = ["form", "yaml"];

const page = $("submit");
const editor = new ManifestEditor($("editor"));
const form = new ManifestForm($("panel-form"), page.dataset.agents.split(" "), (text) => {
  editor.text = text;
  changed();
});
const isNew = page.dataset.isComplete !== "true";
const initialText = isNew ? withLastRepository(editor.text) : editor.text;
const validationStatus = $("validation-status");
let errors = [];
let validation = null;
let timer = 0;
let isComplete = !isNew; // show errors of empty fields
let isSubmitted = false;

function withLastRepository(text) {
  try {
    const { url, branch } = JSON.parse(localStorage.getItem(LAST_REPOSITORY));
    const isRecent = [...$("repositories").options].some((option) => option.value === url);
    if (!isRecent || typeof branch !== "string") return text;
    const manifest = new ManifestDocument(new ManifestDocument(text).set(["repository", "url"], url));
    return manifest.set(["repository", "branch"], branch);
  } catch {
    return text; // no task was submitted in this browser, or there is no storage
  }
}

function saveRepository() {
  try {
    const [url, branch] = ["url", "branch"].map((name) => form.value(`repository.${name}`));
    if (url && branch) localStorage.setItem(LAST_REPOSITORY, JSON.stringify({ url, branch }));
  } catch {
    // Without storage, the form starts without a repository.
  }
}

// What the user has to do first.
const invitation = () =>
  form.value("repository.url") ? "Describe the task." : "Describe the task and choose a repository.";

const selectedTab = () => (location.hash === "#yaml" ? "yaml" : "form");

function showTab() {
  const selected = selectedTab();
  for (const name of TABS) {
    const tab = $(`tab-${name}`);
    tab.setAttribute("aria-selected", String(name === selected));
    tab.tabIndex = name === selected ? 0 : -1;
    $(`panel-${name}`).hidden = name !== selected;
  }
  if (selected === "yaml") editor.show();
  const shownCount = showResult();
  if (errors.length) showErrorCount(shownCount);
}

function selectTab(name) {
  history.replaceState(null, "", name === "yaml" ? "#yaml" : location.pathname + location.search);
  showTab();
}

function showValidationStatus(text, style) {
  validationStatus.replaceChildren(...withCode(text));
  validationStatus.className = `validation-status ${style}`;
}

// The errors, except those of fields that the user has not filled in yet.
function shownErrors() {
  const isHidden = (error) => selectedTab() === "form" && !isComplete && form.isUntouched(error.field);
  return errors.filter((error) => !isHidden(error));
}

// Show errors at the fields of the form or, as a list, with the lines of the YAML. The list next to the form has only
// errors without a visible field.
function showResult() {
  const isForm = selectedTab() === "form";
  const others = form.showErrors(errors, isComplete);
  const shown = shownErrors();
  $("errors").replaceChildren(
    ...shown
      .filter((error) => !isForm || others.includes(error) || form.isFolded(error.field))
      .map((error) => errorItem(error, !isForm)),
  );
  editor.mark(errors.map((error) => error.line).filter(Boolean));
  return shown.length;
}

function errorItem(error, withLine) {
  return h(
    "li",
    {},
    h(
      "button",
      { type: "button", onclick: () => goTo(error) },
      h("span", { class: "mono" }, error.field || "manifest"),
      h("span", {}, error.message),
      withLine && error.line ? h("span", { class: "end" }, `line ${error.line}`) : null,
    ),
  );
}

function goTo({ field, line, column }) {
  if (selectedTab() === "form" && form.goTo(field)) return;
  selectTab("yaml");
  editor.goTo(line, column);
}

// Show a field in the form; a field that the form does not have, in the YAML.
function showField(name) {
  // The reason at the top of the page stays in view.
  if (selectedTab() === "form" && form.goTo(name, { scrolls: !$("raised") })) return;
  const line = form.manifest.problem ? undefined : form.manifest.line(name.split("."));
  if (line) goTo({ field: "", line });
}

// The name of a task without a prompt is empty until the user describes the task.
const isNameDerived = () => !form.isNamed && !form.value("metadata.name") && !form.value("agent.prompt");

function handleResult(error) {
  errors = (error?.details ?? []).filter(({ field }) => field !== "metadata.name" || !isNameDerived());
  const shownCount = showResult();
  if (!error) showValidationStatus("Ready to submit.", "good");
  else if (!errors.length) showValidationStatus(error.message, "ill");
  else showErrorCount(shownCount);
}

// The number of errors is a link to the first one.
function showErrorCount(count) {
  if (!count) {
    showValidationStatus(invitation(), "");
    return;
  }
  showValidationStatus("", "ill");
  const first = () => (selectedTab() === "form" ? form.firstOf(shownErrors()) : errors[0]);
  const text = count === 1 ? "1 error" : `${count} errors`;
  validationStatus.append(
    h("button", { type: "button", title: "Go to the error", onclick: () => goTo(first()) }, text),
  );
}

// Keep unsubmitted input in this browser tab. A manifest contains no secret values.
function saveDraft() {
  if (isSubmitted) return;
  try {
    if (editor.text === initialText) sessionStorage.removeItem(DRAFT);
    else
      sessionStorage.setItem(
        DRAFT,
        JSON.stringify({ text: editor.text, touched: [...form.touched], isNamed: form.isNamed, isComplete }),
      );
  } catch {
    // The storage is full or not allowed.
  }
}

function restoreDraft() {
  try {
    const draft = JSON.parse(sessionStorage.getItem(DRAFT));
    if (typeof draft?.text !== "string") return;
    editor.text = draft.text;
    form.touched = new Set(draft.touched);
    form.isNamed = draft.isNamed;
    isComplete = draft.isComplete;
    $("draft").hidden = false;
  } catch {
    // The draft was written by another version of this page.
  }
}

async function check() {
  validation?.abort();
  if (!isComplete && editor.text === initialText) {
    errors = [];
    showResult();
    showValidationStatus(invitation(), "");
    return;
  }
  validation = new AbortController();
  const { signal } = validation;
  try {
    await request(`${TASKS}?dry_run=true`, { method: "POST", headers: YAML, body: editor.text, signal });
    handleResult(null);
  } catch (error) {
    if (signal.aborted) return;
    if (error.status) handleResult(error);
    else showValidationStatus("The server is not responding.", "ill");
  }
}

function changed() {
  clearTimeout(timer);
  timer = setTimeout(() => {
    saveDraft();
    check();
  }, PAUSE_MILLISECONDS);
}

function replaceText(text) {
  editor.text = text;
  form.show(text);
  changed();
}

// One idempotency key per text, so that a second click or a retry after a lost response does not submit a second task.
let key = { text: null, value: "" };

async function submit() {
  const text = editor.text;
  const bytes = () => crypto.getRandomValues(new Uint8Array(16));
  if (key.text !== text)
    key = { text, value: Array.from(bytes(), (byte) => byte.toString(16).padStart(2, "0")).join("") };
  isComplete = true;
  const button = page.querySelector("[type=submit]");
  button.disabled = true;
  clearTimeout(timer);
  validation?.abort();
  try {
    const headers = { ...YAML, "idempotency-key": key.value };
    const { rerunOf } = page.dataset;
    const url = rerunOf ? `${TASKS}?rerun_of=${encodeURIComponent(rerunOf)}` : TASKS;
    const response = await request(url, { method: "POST", headers, body: text });
    const { task_id } = await response.json();
    isSubmitted = true;
    saveRepository();
    sessionStorage.removeItem(DRAFT);
    location.assign(`/tasks/${encodeURIComponent(task_id)}`);
  } catch (error) {
    saveDraft();
    if (error.status) handleResult(error);
    else showValidationStatus("The server is not responding. Your text is not lost; try again.", "ill");
    if (errors.length && error.details) goTo(selectedTab() === "form" ? form.firstOf(errors) : errors[0]);
    else toast(error.message);
    button.disabled = false;
  }
}

// A template changes its own settings and keeps all other values. Its prompt is only a placeholder. A template for
// another agent, or without settings, replaces the manifest, except for what describes the task.
function applyTemplate(text) {
  const before = editor.text;
  const prompt = $("prompt");
  const { placeholder } = prompt;
  const template = new ManifestDocument(text);
  const agent = template.keys().find((key) => page.dataset.agents.split(" ").includes(key));
  const settings = settingsOf(template, agent);
  const isCombined = !form.manifest.problem && form.agent === agent && settings.length > 0;
  const changes = isCombined ? settings : taskFields(agent);
  let manifest = isCombined ? form.manifest : template;
  for (const [path, value] of changes) manifest = new ManifestDocument(manifest.set(path, value));
  isComplete = false;
  replaceText(manifest.text);
  prompt.placeholder = template.readText([agent, "prompt"]) || placeholder;
  const undo = $("undo");
  undo.hidden = before === initialText;
  undo.onclick = () => {
    undo.hidden = true;
    prompt.placeholder = placeholder;
    replaceText(before);
  };
  if (selectedTab() === "form") prompt.focus();
}

// The paths and values that a template sets. Its secrets are added to those in the manifest.
function settingsOf(template, agent) {
  const paths = [agent, "vm", "lifecycle"].flatMap((section) => template.keys([section]).map((key) => [section, key]));
  const settings = paths
    .filter(([section, key]) => section !== agent || key !== "prompt")
    .map((path) => [path, template.value(path)]);
  const added = template.value(["secrets"]) ?? [];
  if (!added.length || form.manifest.problem) return settings;
  const kept = form.manifest.value(["secrets"]);
  const isOther = ({ name }) => !added.some((secret) => secret.name === name);
  return [
    ...settings,
    [["secrets"], [...(Array.isArray(kept) ? kept.filter((each) => each && isOther(each)) : []), ...added]],
  ];
}

// What describes the task in the current manifest: prompt, name, labels and repository.
function taskFields(agent) {
  const { manifest } = form;
  const read = (path) => (manifest.problem ? "" : (manifest.readText(path) ?? ""));
  const labels = manifest.problem ? {} : (manifest.readMap(["metadata", "labels"]) ?? {});
  return [
    [["metadata", "name"], read(["metadata", "name"])],
    [["metadata", "labels"], Object.keys(labels).length ? labels : undefined],
    [["repository", "url"], read(["repository", "url"])],
    [["repository", "branch"], read(["repository", "branch"]) || "main"],
    [[agent, "prompt"], form.agent ? read([form.agent, "prompt"]) : ""],
  ];
}

editor.textarea.addEventListener("input", () => {
  editor.show();
  form.show(editor.text);
  changed();
});
page.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
});
page.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
for (const button of document.querySelectorAll("[data-pattern]"))
  button.addEventListener("click", () => applyTemplate(button.dataset.pattern));
for (const button of document.querySelectorAll("[data-repository]")) {
  button.addEventListener("click", () => {
    form.set("repository.url", button.dataset.repository);
    form.set("repository.branch", button.dataset.branch);
  });
}
for (const name of TABS) {
  $(`tab-${name}`).addEventListener("click", () => selectTab(name));
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    selectTab(name === "form" ? "yaml" : "form");
    $(`tab-${selectedTab()}`).focus();
  });
}
$("discard").addEventListener("click", () => {
  $("draft").hidden = true;
  form.touched.clear();
  form.isNamed = page.dataset.isComplete === "true";
  isComplete = form.isNamed;
  replaceText(initialText);
});
$("advanced").addEventListener("toggle", showResult);
addEventListener("hashchange", showTab);
addEventListener("pagehide", saveDraft);

form.isNamed = isComplete;
editor.text = initialText;
restoreDraft();
form.show(editor.text);
showTab();
const field = new URLSearchParams(location.search).get("field"); // the field that a link asks to change
if (field) showField(field);
else if (selectedTab() === "form" && !isComplete) $("prompt").focus();
check();
