"use strict";
(() => {
  const table = document.getElementById("board");
  const controls = document.getElementById("controls");
  const search = document.getElementById("search");
  const count = document.getElementById("count");
  const selects = Array.from(controls.querySelectorAll("select"));
  const headers = Array.from(table.tHead.rows[0].cells);
  const entries = Array.from(table.tBodies).map((body) => ({
    body,
    cells: Array.from(body.rows[0].cells),
    facets: JSON.parse(body.dataset.facets),
    text: `${body.rows[0].textContent} ${body.dataset.labels}`.toLowerCase(),
  }));
  const byText = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { body, facets, text } of entries) {
      const fits = words.every((word) => text.includes(word))
        && selects.every(({ name, value }) => value === "" || facets[name].includes(value));
      body.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    const total = entries.length;
    count.textContent = shown === total ? `${total} rows` : `${shown} of ${total} rows`;
  }

  function compare(column, sign) {
    const keys = new Map(entries.map(({ body, cells }) => {
      const { value } = cells[column].dataset;
      return [body, value === undefined ? cells[column].textContent.trim() : Number(value)];
    }));
    return (a, b) => {
      const [left, right] = [keys.get(a.body), keys.get(b.body)];
      return sign * (typeof left === "number" ? left - right : byText.compare(left, right));
    };
  }

  function show(order) {
    table.append(...order.map(({ body }) => body));
  }

  function sortBy(column) {
    const header = headers[column];
    const now = header.getAttribute("aria-sort");
    const first = "descending" in header.dataset ? "descending" : "ascending";
    const next = now === null ? first : now === "ascending" ? "descending" : "ascending";
    headers.forEach((other) => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", next);
    show(entries.slice().sort(compare(column, next === "ascending" ? 1 : -1)));
  }

  function toggle(button) {
    const isOpen = document.getElementById(button.getAttribute("aria-controls")).classList.toggle("is-open");
    button.setAttribute("aria-expanded", String(isOpen));
  }

  headers.forEach((header, column) => header.querySelector("button").addEventListener("click", () => sortBy(column)));
  table.addEventListener("click", (event) => {
    const button = event.target.closest(".open");
    if (button) toggle(button);
  });
  controls.addEventListener("input", filter);
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("reset", () => {
    headers.forEach((header) => header.removeAttribute("aria-sort"));
    show(entries);
    setTimeout(filter); // the fields are empty only after this event
  });
  filter();
})();
