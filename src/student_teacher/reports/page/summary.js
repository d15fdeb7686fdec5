"use strict";

const body = document.querySelector("#summary tbody");
const headings = [...document.querySelectorAll("#summary thead th")];
const rows = [...body.rows].map((row) => ({ row, values: JSON.parse(row.dataset.values) }));

function sortBy(heading) {
  const key = heading.dataset.key;
  // Names start from A, figures from the best.
  const first = key === "category" ? "ascending" : "descending";
  const other = first === "ascending" ? "descending" : "ascending";
  const order = heading.ariaSort === first ? other : first;
  const sign = order === "ascending" ? 1 : -1;
  const compare = (a, b) => (key === "category" ? a.localeCompare(b) : a - b);
  rows.sort(({ values: { [key]: a } }, { values: { [key]: b } }) => {
    if (a === null || b === null) return (a === null) - (b === null); // what is missing stands last in either order
    return sign * compare(a, b);
  });
  body.append(...rows.map(({ row }) => row));
  for (const each of headings) each.ariaSort = each === heading ? order : "none";
  document.getElementById("live").textContent = `sorted by ${heading.textContent}, ${order}`;
}

for (const heading of headings) heading.firstElementChild.addEventListener("click", () => sortBy(heading));
