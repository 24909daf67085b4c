// Compares two configurations on the cells that they share. The two are in the address.
(function () {
  "use strict";

  const form = document.getElementById("choose");
  if (!form) return;
  const site = window.methodbench, stats = window.methodbenchStats, charts = window.methodbenchCharts;
  const { load, loadIndex, number, signed, element } = window.methodbenchTables;
  const status = document.getElementById("compare-status"), output = document.getElementById("comparison");
  const { board: boardBox, a: boxA, b: boxB } = form.elements;
  let boards = [], turns = 0;

  function fill(select, board, wanted, other) {
    const ids = Object.keys(board.labels).sort((x, y) => board.labels[x].localeCompare(board.labels[y], "en", { numeric: true }));
    select.replaceChildren(...ids.map((id) => element("option", { value: id }, board.labels[id])));
    select.value = ids.includes(wanted) ? wanted : ids.find((id) => id !== other) || ids[0] || "";
  }

  function showState() {
    const { state } = site;
    const board = boards.find((each) => each.path === state.get("board")) || boards[0];
    boardBox.value = board.path;
    // Two that meet on a table, where nothing is chosen.
    const meeting = board.tables.find((table) => table.rows.length > 1) || board.tables[0];
    fill(boxA, board, state.get("a") || meeting.rows[0], state.get("b"));
    fill(boxB, board, state.get("b") || meeting.rows.find((id) => id !== boxA.value), boxA.value);
    return board;
  }

  async function show() {
    const turn = ++turns, board = showState(), a = boxA.value, b = boxB.value;
    const shared = board.tables.filter((table) => table.rows.includes(a) && table.rows.includes(b));
    status.textContent = "";
    try {
      const tables = await Promise.all(shared.map((table) => load("", table.src)));
      if (turn !== turns) return;
      if (a === b) say("Choose two different configurations.");
      else if (!shared.length) say("The two were never run on the same model.");
      else write(tables, a, b);
    } catch (error) {
      say("The data of this board cannot be loaded.");
    }
    document.title = boxA.selectedOptions[0].textContent + " and " + boxB.selectedOptions[0].textContent + " · methodbench";
    document.documentElement.dataset.updated = String(turn);
  }

  function say(text) {
    output.replaceChildren();
    status.textContent = text;
  }

  // What each question that both were scored on says.
  function comparisons(tables, a, b) {
    const found = [];
    for (const table of tables) {
      const [left, right] = [a, b].map((id) => table.rows.findIndex((row) => row.id === id));
      table.questions.forEach((asked, question) => {
        const [x, y] = [table.cell(left, question), table.cell(right, question)];
        if (!x || !y || x.value === undefined || y.value === undefined) return;
        const said = { asked, x, y, why: "" };
        if (!x.scores || !y.scores) said.why = "scores of single units are not in this page’s data";
        else if (x.scores.length !== y.scores.length) said.why = "scored on different units";
        else {
          try {
            said.paired = stats.pairedDifference(x.scores, y.scores, asked.how);
          } catch (error) {
            said.why = "no unit was scored by both";
          }
        }
        found.push(said);
      });
    }
    return found;
  }

  // What the interval says of A: win, loss or tie; empty where it says nothing.
  function verdict({ asked, paired }) {
    if (!paired || Number.isNaN(paired.difference)) return "";
    if (!(paired.low > 0 || paired.high < 0)) return "tie";
    return (paired.low > 0) === asked.lower ? "loss" : "win";
  }

  function write(tables, a, b) {
    const rows = [a, b].map((id) => tables[0].rows.find((row) => row.id === id));
    const found = comparisons(tables, a, b);
    const counts = { win: 0, tie: 0, loss: 0 };
    for (const said of found) if (verdict(said)) counts[verdict(said)] += 1;
    const link = (row) => element("a", { href: row.page }, element("bdi", {}, row.label));
    const parts = [element("p", { class: "outcome" }, "A, ", link(rows[0]), ", against B, ", link(rows[1]), ": ",
      element("b", {}, counts.win + plural(" win", counts.win)), ", ",
      element("b", {}, counts.tie + plural(" tie", counts.tie)), ", ",
      element("b", {}, counts.loss + (counts.loss === 1 ? " loss" : " losses")),
      " on " + found.length + plural(" shared cell", found.length) + ".")];
    if (!found.length) {
      say("The two share no cell that both were scored on.");
      return;
    }
    if (rows[0].positions !== rows[1].positions) {
      parts.push(element("p", { class: "note" }, "The two touch different positions of a sequence, and are ranked apart on the board."));
    }
    parts.push(section("Cells", cellTable(found)), section("Settings that differ", settingsTable(rows)), section("Unit by unit", ...drawings(found, rows)));
    output.replaceChildren(...parts);
  }

  function plural(word, count) {
    return count === 1 ? word : word + "s";
  }

  function section(title, ...content) {
    return element("section", {}, element("h2", {}, title), ...content);
  }

  function scrolling(label, table) {
    const box = element("div", { class: "scroll", role: "region", "aria-label": label, tabindex: "0" }, table);
    return box;
  }

  function cellTable(found) {
    const head = ["Task", "Model", "Metric", "A", "B", "A − B", "95 % interval", "p", "For A"];
    const body = found.map((said) => {
      const { asked, x, y, paired, why } = said, outcome = verdict(said);
      return element("tr", {},
        element("th", { scope: "row" }, element("bdi", {}, asked.task), asked.suffix ? element("span", { class: "sub" }, asked.suffix) : null),
        element("td", {}, element("bdi", {}, asked.model || "–")),
        element("td", {}, asked.metric + (asked.unit ? " (" + asked.unit + ")" : "") + (asked.lower ? " ↓" : " ↑")),
        element("td", { class: "num" }, element("a", { class: "quiet", href: x.path }, number(paired ? paired.valueA : x.value))),
        element("td", { class: "num" }, element("a", { class: "quiet", href: y.path }, number(paired ? paired.valueB : y.value))),
        element("td", { class: "num" + (outcome && outcome !== "tie" ? " sure" : "") }, paired ? signed(paired.difference) : "–"),
        element("td", {}, paired && Number.isFinite(paired.low) && Number.isFinite(paired.high) ? signed(paired.low) + " to " + signed(paired.high) : "–"),
        element("td", { class: "num" }, paired && Number.isFinite(paired.pValue) ? number(paired.pValue) : "–"),
        element("td", { title: why || null }, outcome || "–", why ? element("span", { class: "sub" }, why) : null));
    });
    return element("div", {}, scrolling("Cells", element("table", { class: "plain", id: "cells" },
      element("caption", {}, "↓ lower is better, ↑ higher is better. A tie: the interval of the paired difference holds zero. p: sign-flip permutation test, not adjusted for the number of cells."),
      element("thead", {}, element("tr", {}, ...head.map((title) => element("th", { scope: "col", class: ["A", "B", "A − B", "p"].includes(title) ? "num" : null }, title)))),
      element("tbody", {}, ...body))));
  }

  function settingsTable(rows) {
    const named = [["method", rows.map((row) => row.method)], ["variant", rows.map((row) => row.variant || "–")],
      ["storage", rows.map((row) => row.storage || "–")]];
    const names = new Set(rows.flatMap((row) => Object.keys(row.params)));
    for (const name of [...names].sort()) {
      named.push([name, rows.map((row) => (Object.hasOwn(row.params, name) ? row.params[name] : "–"))]);
    }
    const differ = named.filter(([, [left, right]]) => left !== right);
    if (!differ.length) return element("p", { class: "note" }, "None that is recorded.");
    return scrolling("Settings that differ", element("table", { class: "plain" },
      element("caption", { class: "hidden" }, "Settings that differ"),
      element("thead", {}, element("tr", {}, ...["Setting", "A", "B"].map((title) => element("th", { scope: "col" }, title)))),
      element("tbody", {}, ...differ.map(([name, values]) => element("tr", {},
        element("th", { scope: "row" }, element("bdi", {}, name)),
        ...values.map((value) => element("td", { class: "reason" }, element("bdi", {}, String(value)))))))));
  }

  function drawings(found, rows) {
    const drawn = found.filter(({ paired }) => paired).map(({ asked, x, y }) => {
      const svg = charts.scatter(x.scores, y.scores, { x: "A: " + rows[0].label, y: "B: " + rows[1].label });
      if (!svg) return null;
      svg.classList.add("square");
      return element("figure", {}, svg, element("figcaption", {}, element("bdi", {}, asked.task),
        asked.model ? ", " : "", element("bdi", {}, asked.model), ": scores of single units; "
        + (asked.lower ? "A is better above the line." : "A is better below the line.")));
    }).filter(Boolean);
    return drawn.length ? [element("div", { class: "squares" }, ...drawn)] : [element("p", { class: "note" }, "No cell has two units that both scored.")];
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", (event) => {
    const { state } = site;
    if (event.target === boardBox) for (const name of ["a", "b"]) state.delete(name);
    state.set("board", boardBox.value);
    if (event.target !== boardBox) {
      state.set("a", boxA.value);
      state.set("b", boxB.value);
    }
    site.save(true);
    show();
  });
  site.follow(show);
  loadIndex("").then((found) => {
    boards = found;
    return show();
  }, () => say("The data of the boards cannot be loaded."));
})();
