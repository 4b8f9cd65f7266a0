// Exchanges a token for a session cookie.
import { $ } from "/assets/page.js";

const form = $("sign-in");
const back = form.dataset.back;

// Browsers omit the cookie when a link on another site opened this page. If the session is valid, no sign-in is needed.
fetch(back, { method: "HEAD", redirect: "manual", headers: { accept: "text/html" } }).then((response) => {
  if (response.ok) location.replace(back);
});

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const token = $("token").value.trim();
  $("sign-in-error").textContent = "";
  try {
    const response = await fetch("/api/v1/session", { method: "POST", headers: { authorization: `Bearer ${token}` } });
    if (response.ok) return location.assign(back);
    $("sign-in-error").textContent =
      response.status === 401 ? "Invalid token." : `The server responded with ${response.status}.`;
  } catch (error) {
    $("sign-in-error").textContent =
      error instanceof TypeError ? "The server is not responding, or the token has invalid characters." : String(error);
  }
  $("token").select();
});
