// Shows a token once, for a cookie.
import { $ } from "/assets/page.js";

const form = $("sign-in");
const back = form.dataset.back;

// A cookie is not sent with the first request of a link from another site; whoever has one need not sign in again.
fetch(back, { method: "HEAD", redirect: "manual", headers: { accept: "text/html" } }).then((answer) => {
  if (answer.ok) location.replace(back);
});

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const token = $("token").value.trim();
  $("sign-in-error").textContent = "";
  try {
    const answer = await fetch("/api/v1/session", { method: "POST", headers: { authorization: `Bearer ${token}` } });
    if (answer.ok) return location.assign(back);
    $("sign-in-error").textContent = answer.status === 401 ? "This token is not known here." : `The server answered ${answer.status}.`;
  } catch (error) {
    $("sign-in-error").textContent = error instanceof TypeError ? "The server does not answer, or this is no token." : String(error);
  }
  $("token").select();
});
