// The theme wraps the button that copies a code block in <nav>, as a landmark without a name. It is no navigation.
function removeLandmarks() {
  for (const nav of document.querySelectorAll("nav.md-code__nav:not([role])")) nav.setAttribute("role", "none");
}

new MutationObserver(removeLandmarks).observe(document.documentElement, { childList: true, subtree: true });
removeLandmarks();
