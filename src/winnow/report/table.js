// Sorting, filtering, folding and copying in the table of trials, whose rows are already in the page.
"use strict";
(() => {
  const table = document.getElementById("trials");
  const body = table.tBodies[0];
  // a trial and its details move and hide together
  const pairs = [...body.querySelectorAll("tr.trial")].map((row) => ({ row, details: row.nextElementSibling }));
  const headers = [...table.tHead.rows[0].cells];
  const filters = [...document.querySelectorAll("[data-show]")];
  const find = document.getElementById("find");
  const unfold = document.getElementById("unfold");
  let show = "all";

  function fold(pair, open) {
    pair.row.querySelector(".more").setAttribute("aria-expanded", String(open));
    pair.details.hidden = !open || pair.row.hidden;
  }

  const isOpen = (pair) => pair.row.querySelector(".more").getAttribute("aria-expanded") === "true";

  function filter() {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const pair of pairs) {
      const text = pair.row.textContent.toLowerCase();
      const match = (show === "all" || pair.row.classList.contains(show)) && words.every((word) => text.includes(word));
      pair.row.hidden = !match;
      pair.details.hidden = !match || !isOpen(pair);
      count += match;
    }
    document.getElementById("shown").textContent =
      count === pairs.length ? "" : count ? `${count} of ${pairs.length} trials shown.` : "No trial matches.";
  }

  function choose(which) {
    show = which;
    filters.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.show === which)));
    filter();
  }

  function sort(index, direction) {
    const key = (pair) => pair.row.cells[index].dataset.sort;
    const numeric = pairs.every((pair) => key(pair) === "" || !Number.isNaN(Number(key(pair))));
    const sign = direction === "ascending" ? 1 : -1;
    pairs.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // without a figure: last, either way
      return sign * (numeric ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true }));
    });
    body.append(...pairs.flatMap((pair) => [pair.row, pair.details]));
    headers.forEach((header, i) =>
      i === index ? header.setAttribute("aria-sort", direction) : header.removeAttribute("aria-sort"));
  }

  function pick(number) {
    const pair = pairs.find(({ row }) => row.id === `trial-${number}`);
    if (!pair) return;
    if (pair.row.hidden) {
      find.value = "";
      choose("all");
    }
    pairs.forEach(({ row }) => row.classList.remove("picked"));
    pair.row.classList.add("picked");
    fold(pair, true);
    pair.row.scrollIntoView({ block: "center" });
  }

  async function copy(button) {
    const text = button.closest(".command").querySelector("code").textContent;
    let done = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // pages opened from a file may not have the clipboard: copy through a selection instead
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
    }
    button.textContent = done ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  }

  headers.forEach((header, index) => {
    const button = header.querySelector(".sort");
    if (!button) return;
    button.addEventListener("click", () =>
      sort(index, header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending"));
  });
  filters.forEach((button) => button.addEventListener("click", () => choose(button.dataset.show)));
  find.addEventListener("input", filter);
  unfold.addEventListener("click", () => {
    const open = unfold.textContent === "Unfold all";
    pairs.forEach((pair) => fold(pair, open));
    unfold.textContent = open ? "Fold all" : "Unfold all";
  });
  body.addEventListener("click", (event) => {
    const target = event.target;
    if (target.closest(".copy")) return void copy(target.closest(".copy"));
    const row = target.closest("tr.trial");
    if (!row || target.closest("a") || String(window.getSelection())) return;
    const pair = pairs.find((p) => p.row === row);
    fold(pair, !isOpen(pair));
  });
  const fromHash = () => {
    const match = /^#trial-(\d+)$/.exec(window.location.hash);
    if (match) pick(Number(match[1]));
  };
  window.addEventListener("hashchange", fromHash);
  pairs.forEach((pair) => fold(pair, false));
  sort(0, "ascending");
  window.winnow.onPick(pick);
  fromHash();
})();
