// Adds sorting, a text filter and copy buttons to pages that are complete without it; keeps what the reader has chosen
// in the address. Other scripts share the state through the global methodbench.
(function () {
  "use strict";

  let state = readState() || new URLSearchParams();
  const followers = [];

  function readState() {
    const hash = location.hash.slice(1);
    // Anything without "=" is an ordinary anchor, which leaves the state as it is.
    return hash && !hash.includes("=") ? null : new URLSearchParams(hash);
  }

  // A step is what the back button undoes.
  function saveState(step) {
    const text = state.toString();
    const address = location.pathname + location.search + (text ? "#" + text : "");
    try {
      if (step) history.pushState(null, "", address);
      else history.replaceState(null, "", address);
    } catch (error) {
      // Some browsers forbid it for files; the page works without.
    }
  }

  addEventListener("popstate", () => {
    const found = readState();
    if (!found || found.toString() === state.toString()) return;
    state = found;
    for (const follow of followers) follow();
  });

  function text(cell) {
    return cell ? cell.textContent.trim().toLowerCase() : "";
  }

  function compare(a, b, column, kind, sign) {
    const left = a.cells[column], right = b.cells[column];
    if (kind === "text") return sign * text(left).localeCompare(text(right), "en", { numeric: true });
    const x = left && left.dataset.sort, y = right && right.dataset.sort;
    // Cells without a number come last in either direction.
    if (!x || !y) return (x ? 0 : 1) - (y ? 0 : 1);
    return sign * (Number(x) - Number(y));
  }

  function sortTable(table, header, ascending) {
    const row = header.parentElement;
    const column = Array.from(row.cells).indexOf(header);
    for (const other of row.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    for (const body of table.tBodies) {
      if (body.classList.contains("heading")) continue;
      const rows = Array.from(body.rows);
      rows.sort((a, b) => compare(a, b, column, header.dataset.sorts, ascending ? 1 : -1));
      body.append(...rows);
    }
    return column;
  }

  const resorts = new Map();

  // Sorts a table again as the state says, after its cells have changed.
  function resort(table) {
    resorts.get(table)();
  }

  function makeSortable(table) {
    const head = table.tHead.rows[table.tHead.rows.length - 1];
    for (const header of head.cells) {
      if (!header.dataset.sorts) continue;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => {
        const current = header.getAttribute("aria-sort");
        const ascending = current ? current === "descending" : header.dataset.sorts !== "down";
        const column = sortTable(table, header, ascending);
        if (table.id) {
          state.set("sort." + table.id, (ascending ? "" : "-") + column);
          saveState(true);
        }
      });
    }
    const first = Array.from(head.cells).find((header) => header.hasAttribute("aria-sort"));
    const direction = first && first.getAttribute("aria-sort");
    const orders = Array.from(table.tBodies, (body) => Array.from(body.rows));
    const follow = () => {
      const wanted = table.id && state.get("sort." + table.id);
      const header = wanted && head.cells[Number(wanted.replace("-", ""))];
      if (header && header.dataset.sorts) {
        sortTable(table, header, !wanted.startsWith("-"));
        return;
      }
      orders.forEach((rows, place) => table.tBodies[place].append(...rows));
      for (const other of head.cells) other.removeAttribute("aria-sort");
      if (first) first.setAttribute("aria-sort", direction);
    };
    resorts.set(table, follow);
    followers.push(follow);
    if (table.id && state.has("sort." + table.id)) follow();
  }

  function makeFilter(input) {
    const status = document.getElementById("filter-status");
    const rows = Array.from(document.querySelectorAll("tr[data-find]"));
    const apply = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        row.hidden = !words.every((word) => row.dataset.find.includes(word));
        if (!row.hidden) shown += 1;
      }
      status.textContent = words.length
        ? shown + " of " + rows.length + " rows"
        : "";
    };
    const follow = () => {
      input.value = state.get("q") || "";
      apply();
    };
    followers.push(follow);
    follow();
    input.addEventListener("input", () => {
      apply();
      if (input.value) state.set("q", input.value);
      else state.delete("q");
      saveState();
    });
    input.form.addEventListener("submit", (event) => event.preventDefault());
  }

  function makeCopyable(block) {
    const code = block.querySelector("code");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.setAttribute("aria-live", "polite");
    button.addEventListener("click", async () => {
      const done = await copy(code.textContent, code);
      button.textContent = done ? "Copied" : "Press Ctrl-C";
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
    block.append(button);
  }

  // Where the clipboard is out of reach, the element with the text, or one made for it, is selected and copied.
  async function copy(words, shown) {
    try {
      await navigator.clipboard.writeText(words);
      return true;
    } catch (error) {
      const made = shown ? null : document.createElement("pre");
      if (made) {
        made.className = "hidden";
        made.textContent = words;
        document.body.append(made);
      }
      const range = document.createRange();
      range.selectNodeContents(shown || made);
      const selection = getSelection();
      selection.removeAllRanges();
      selection.addRange(range);
      const done = document.execCommand("copy");
      if (made) made.remove();
      return done;
    }
  }

  window.methodbench = {
    get state() { return state; },
    save: saveState,
    follow: (follower) => followers.push(follower),
    sort: sortTable,
    resort,
    copy,
  };

  document.querySelectorAll("table.sortable").forEach(makeSortable);
  const input = document.getElementById("filter");
  // A board filters by more, and ranks again what is left.
  if (input && !document.querySelector("table.board")) makeFilter(input);
  document.querySelectorAll("pre.copy").forEach(makeCopyable);
  for (const box of document.querySelectorAll(".scroll, .text, .facts dd")) {
    const mark = () => box.classList.toggle("scrolled", box.scrollLeft > 2);
    box.addEventListener("scroll", mark, { passive: true });
    // What scrolls must be reachable by keyboard, and only that.
    const reach = () => {
      if (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    };
    const sized = new ResizeObserver(reach);
    for (const one of [box, ...box.children]) sized.observe(one);
  }
})();
