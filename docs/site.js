// The theme wraps the button that copies a code block in <nav>, as a landmark without a name. It is no navigation.
function removeLandmarks() {
  for (const nav of document.querySelectorAll("nav.md-code__nav:not([role])")) nav.setAttribute("role", "none");
}

// On a narrow screen, site.css shows each row of a table as a block, with the column headings as labels. The roles
// keep the table a table for screen readers.
function labelCells() {
  for (const table of document.querySelectorAll(".md-typeset table:not([class], [data-stacked])")) {
    const labels = [...table.querySelectorAll("thead th")].map((heading) => heading.textContent);
    table.dataset.stacked = "";
    table.setAttribute("role", "table");
    for (const group of table.querySelectorAll("thead, tbody")) group.setAttribute("role", "rowgroup");
    for (const row of table.rows) {
      row.setAttribute("role", "row");
      if (row.parentElement.tagName !== "TBODY") continue;
      for (const [column, cell] of [...row.cells].entries()) {
        cell.setAttribute("role", "cell");
        if (labels[column]) cell.dataset.label = labels[column];
      }
    }
  }
}

function prepare() {
  removeLandmarks();
  labelCells();
}

new MutationObserver(prepare).observe(document.documentElement, { childList: true, subtree: true });
prepare();
