// Asks for a change: a new task that continues an ended one.
import { $, request } from "/assets/page.js";

// Submit the new task, and open its page. Throws an Error with the server's message.
export async function continueTask(api, prompt) {
  const response = await request(`${api}/continue`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ prompt }),
  });
  const { task_id } = await response.json();
  location.assign(`/tasks/${encodeURIComponent(task_id)}`);
}

// Open the dialog. The text is kept until it is submitted, even if the user leaves the page.
export function askForChange(api) {
  const draft = `sandbox.change.${api}`;
  const text = $("change-prompt");
  text.value = sessionStorage.getItem(draft) ?? text.value;
  $("change-error").textContent = "";
  text.oninput = () => sessionStorage.setItem(draft, text.value);
  $("change-back").onclick = () => $("change").close();
  $("change").querySelector("form").onsubmit = async (event) => {
    event.preventDefault();
    $("change-submit").disabled = true;
    try {
      await continueTask(api, text.value);
      sessionStorage.removeItem(draft);
    } catch (error) {
      $("change-error").textContent = error.message;
    }
    $("change-submit").disabled = false;
  };
  $("change").showModal();
  text.focus();
}
