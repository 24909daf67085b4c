// Filters a board, ranks again what is left, hides columns, draws charts with other axes and copies cells. What is
// chosen is in the address, so that the same link shows the same numbers.
(function () {
  "use strict";

  const site = window.methodbench, stats = window.methodbenchStats, charts = window.methodbenchCharts;
  const { load, number, element } = window.methodbenchTables;
  const form = document.getElementById("filters"), status = document.getElementById("filter-status");
  const unfiltered = status.textContent;
  // Numbers that are kept of resamples; they serve every filter. About 80 MB.
  const MOST_DRAWN = 1e7;
  // Milliseconds after which a long computation lets the browser draw.
  const TURN = 50;

  const sections = Array.from(document.querySelectorAll("section.table"), (node) => {
    const table = node.querySelector("table.board"), head = table.tHead.rows[table.tHead.rows.length - 1];
    // A configuration may also be in tables of every metric; its line is the one on the board itself.
    const rows = new Map(), lines = new Map();
    for (const row of node.querySelectorAll("tr[data-row]")) {
      if (!rows.has(row.dataset.row)) rows.set(row.dataset.row, []);
      rows.get(row.dataset.row).push(row);
      if (row.closest("table") === table) lines.set(row.dataset.row, row);
    }
    const columns = Array.from(head.cells, (cell, at) => ({
      at, cell, kind: cell.dataset.column || "", question: "question" in cell.dataset ? Number(cell.dataset.question) : -1,
    }));
    return {
      node, table, rows, lines, columns, tasks: table.dataset.tasks.trim().split(" "), compact: table.classList.contains("compact"),
      figures: Array.from(node.querySelectorAll("figure[data-pareto]")),
      charts: Array.from(node.querySelectorAll("figure[data-chart]")),
      originals: new Map(), shaded: new Map(), drawn: new Map(),
      order: columns.map((column) => column.cell.getAttribute("aria-sort")),
    };
  });

  // --- what is chosen -------------------------------------------------------------------------------------------

  function limit(name) {
    const text = site.state.get(name);
    return text === null || text === "" || Number.isNaN(Number(text)) ? null : Number(text);
  }

  function chosen() {
    const state = site.state;
    return {
      words: (state.get("q") || "").toLowerCase().split(/\s+/).filter(Boolean),
      model: state.get("model") || "",
      storage: state.get("storage") || "",
      low: limit("bits-min"),
      high: limit("bits-max"),
      tasks: new Set(state.getAll("task")),
      hidden: new Set(state.getAll("hide")),
    };
  }

  function restricts(wanted) {
    return Boolean(wanted.words.length || wanted.storage || wanted.low !== null || wanted.high !== null);
  }

  function suits(row, wanted) {
    if (!wanted.words.every((word) => row.find.includes(word))) return false;
    if (wanted.storage && row.storage !== wanted.storage) return false;
    if (wanted.low === null && wanted.high === null) return true;
    const bits = row.bits === undefined || row.bits === null ? NaN : row.bits;
    return (wanted.low === null || bits >= wanted.low) && (wanted.high === null || bits <= wanted.high);
  }

  function showState() {
    const state = site.state, tasks = new Set(state.getAll("task")), hidden = new Set(state.getAll("hide"));
    for (const control of form.elements) {
      if (control.name === "task") control.checked = !tasks.size || tasks.has(control.value);
      else if (control.name === "column") control.checked = !hidden.has(control.value);
      else if (control.name) control.value = state.get(control.name) || "";
    }
    for (const section of sections) {
      for (const select of section.node.querySelectorAll("select[data-axis]")) {
        const wanted = state.get(axisName(select));
        const option = Array.from(select.options).find((each) => each.value === wanted);
        const usual = Array.from(select.options).find((each) => each.defaultSelected) || select.options[0];
        select.value = (option || usual).value;
      }
    }
  }

  function axisName(select) {
    return select.dataset.axis + "." + select.closest("figure").querySelector("svg").dataset.name;
  }

  function take(control) {
    const state = site.state;
    if (control.name === "task" || control.name === "column") {
      const boxes = Array.from(form.elements).filter((each) => each.name === control.name);
      const key = control.name === "task" ? "task" : "hide";
      const named = boxes.filter((box) => box.checked === (key === "task"));
      state.delete(key);
      if (key === "hide" || named.length < boxes.length) for (const box of named) state.append(key, box.value);
    } else if (control.value) state.set(control.name, control.value);
    else state.delete(control.name);
  }

  // --- columns --------------------------------------------------------------------------------------------------

  function showColumns(section, wanted) {
    const asked = section.tasks.map((task) => !wanted.tasks.size || wanted.tasks.has(task));
    const shown = section.columns.map(({ kind, question }) =>
      (question < 0 || asked[question]) && !(kind && kind !== "value" && wanted.hidden.has(kind)));
    if (section.compact) section.table.classList.toggle("hide-rank", wanted.hidden.has("rank"));
    const rows = [section.table.tHead.rows[section.table.tHead.rows.length - 1]];
    for (const body of section.table.tBodies) if (!body.classList.contains("heading")) rows.push(...body.rows);
    for (const row of rows) shown.forEach((visible, at) => { if (row.cells[at]) row.cells[at].hidden = !visible; });
    const groups = section.table.querySelector("tr.tasks");
    if (groups) {
      const width = (which) => section.columns.filter((column, at) => shown[at] && which(column)).length;
      for (const cell of groups.cells) {
        const question = "question" in cell.dataset ? Number(cell.dataset.question) : -1;
        if (question < 0 && !cell.classList.contains("costs")) continue;
        const wide = width((column) => question < 0 ? column.question < 0 && column.kind : column.question === question);
        cell.hidden = !wide;
        if (wide) cell.colSpan = wide;
      }
    }
    for (const block of section.node.querySelectorAll("section[data-question]")) {
      block.hidden = !asked[Number(block.dataset.question)];
    }
  }

  // --- ranks ----------------------------------------------------------------------------------------------------

  // Aggregates of the resamples of every row that was scored on so many units; they serve every set of rows.
  function resamplesOf(section, data, question, units) {
    const name = question + "/" + units;
    if (section.drawn.has(name)) return section.drawn.get(name);
    const { how, lower } = data.questions[question];
    const columns = new Map(), scores = [];
    data.rows.forEach((row, place) => {
      const cell = data.cell(place, question);
      if (row.baseline || !rankable(cell) || cell.units !== units) return;
      columns.set(place, scores.length);
      scores.push(stats.worstFilled(cell.scores, lower));
    });
    const made = {
      columns,
      width: scores.length,
      point: Float64Array.from(scores, (row) => stats.reduce(row, how)),
      drawn: units < 2 || how === "single" ? null : stats.resampledAggregates(scores, how),
    };
    let total = made.drawn ? made.drawn.length : 0;
    for (const other of section.drawn.values()) total += other.drawn ? other.drawn.length : 0;
    for (const [other, { drawn }] of section.drawn) {
      if (total <= MOST_DRAWN) break;
      total -= drawn ? drawn.length : 0;
      section.drawn.delete(other);
    }
    section.drawn.set(name, made);
    return made;
  }

  function rankable(cell) {
    return cell && cell.value !== undefined && cell.scores && !cell.failed;
  }

  // Ranks of the rows in the set on one question, by place of the row; as the builder makes them.
  function ranksOf(section, data, question, visible) {
    const found = new Map(), groups = new Map(), { lower, kept } = data.questions[question];
    if (!kept) return null;
    data.rows.forEach((row, place) => {
      if (row.baseline || !visible.has(row.id) || !rankable(data.cell(place, question))) return;
      if (!groups.has(row.positions)) groups.set(row.positions, []);
      groups.get(row.positions).push(place);
    });
    for (const places of groups.values()) {
      const sizes = new Map();
      for (const place of places) {
        const { units } = data.cell(place, question);
        sizes.set(units, (sizes.get(units) || 0) + 1);
      }
      const [units] = [...sizes].reduce((a, b) => (b[1] > a[1] || (b[1] === a[1] && b[0] > a[0]) ? b : a));
      const ranked = places.filter((place) => data.cell(place, question).units === units);
      const { columns, width, point, drawn } = resamplesOf(section, data, question, units);
      const ranks = stats.ranksOfDraws(drawn, width, point, ranked.map((place) => columns.get(place)), lower, stats.LEVEL);
      ranked.forEach((place, at) => found.set(place, { rank: ranks[at], of: ranked.length }));
    }
    return found;
  }

  function rankText([, low, high]) {
    return low === high ? String(low) : low + "–" + high;
  }

  function writeRanks(section, data, question, found) {
    const column = section.columns.find((each) => each.question === question && each.kind === (section.compact ? "value" : "rank"));
    data.rows.forEach((row, place) => {
      const line = section.lines.get(row.id), cell = line && line.cells[column.at];
      if (!cell || row.baseline) return;
      const ranked = found && found.get(place);
      const target = section.compact ? cell.querySelector("b") : cell;
      if (!target) return;
      if (!section.originals.has(target)) {
        section.originals.set(target, { nodes: Array.from(target.childNodes), title: target.title, sort: target.dataset.sort });
      }
      target.textContent = ranked ? rankText(ranked.rank) : "–";
      target.title = ranked
        ? "place " + ranked.rank[0] + " of " + ranked.of + " shown"
        : found ? "not ranked here" : "too many scores to rank them here";
      if (!section.compact) target.dataset.sort = ranked ? ranked.rank[0] : "";
    });
  }

  function restoreRanks(section) {
    for (const [target, { nodes, title, sort }] of section.originals) {
      target.replaceChildren(...nodes);
      if (title) target.title = title;
      else target.removeAttribute("title");
      if (sort !== undefined) target.dataset.sort = sort;
    }
    section.originals.clear();
  }

  // --- charts ---------------------------------------------------------------------------------------------------

  const COSTS = { bits_per_weight: "bits", model_bytes: "bytes", wall_seconds: "seconds", peak_memory_bytes: "memory" };

  function drawChart(section, data, figure, visible) {
    const [x, y] = ["x", "y"].map((axis) => figure.querySelector("select[data-axis=" + axis + "]"));
    const question = Number(figure.dataset.pareto), asked = data.questions[question], other = y.value;
    let lower = asked.lower, label = asked.metric + (asked.unit ? ", " + asked.unit : "");
    const points = [];
    data.rows.forEach((row, place) => {
      const cell = data.cell(place, question);
      if (!cell || cell.value === undefined || !(visible.has(row.id) || row.baseline)) return;
      const quality = other ? (cell.others || {})[other] : cell;
      if (!quality) return;
      if (other) [lower, label] = [quality.lower, quality.label];
      const accounted = x.value === "bits_per_weight" && cell.simulated ? cell.accounted : undefined;
      const cost = accounted === undefined ? cell[COSTS[x.value]] : accounted;
      points.push({
        label: row.label, path: section.table.dataset.root + cell.path, cost: cost === undefined ? NaN : cost,
        quality: quality.value, baseline: row.baseline, simulated: cell.simulated,
        compared: row.baseline || row.positions === data.largest,
      });
    });
    const svg = charts.pareto(points, lower, {
      x: x.selectedOptions[0].textContent, y: label, better: lower ? "lower is better" : "higher is better",
    });
    const place = figure.querySelector("svg.chart");
    if (svg) {
      svg.dataset.name = place.dataset.name;
      place.replaceWith(svg);
    }
    const without = points.filter((point) => !Number.isFinite(point.cost) || !Number.isFinite(point.quality)).map((point) => point.label);
    writeLeftOut(figure, svg && without.length ? " Not drawn, for want of finite numbers: " + without.slice(0, 8).join(", ")
      + (without.length > 8 ? " and " + (without.length - 8) + " more" : "") + "." : "");
    figure.querySelector(".axes-note").textContent = svg ? "" : "Fewer than two points have both numbers.";
    if (!svg) place.replaceChildren(...Array.from(place.querySelectorAll("title, desc")));
  }

  function writeLeftOut(figure, text) {
    const place = figure.querySelector(".left-out");
    if (figure.leftOut === undefined) figure.leftOut = place.textContent;
    place.textContent = text === null ? figure.leftOut : text;
  }

  // Puts a chart of what is left in the place of that of all rows, or says why there is none.
  function replaceFigure(figure, svg, caption) {
    if (!figure.kept) figure.kept = Array.from(figure.childNodes);
    figure.replaceChildren(...(svg ? [element("div", { class: "scroll" }, svg)] : []), element("figcaption", {}, caption));
  }

  function restoreFigure(figure) {
    if (!figure.kept) return;
    figure.replaceChildren(...figure.kept);
    delete figure.kept;
  }

  // Rows of which something is said on a question: what is left, and the baselines.
  function scoredRows(data, question, visible) {
    return data.rows.flatMap((row, place) => {
      const cell = data.cell(place, question);
      return cell && cell.value !== undefined && (row.baseline || visible.has(row.id)) ? [[row, cell]] : [];
    });
  }

  const MOST_FOREST = 40;

  const draw = {
    forest(section, data, figure, visible) {
      const asked = data.questions[Number(figure.dataset.of)];
      const rows = scoredRows(data, Number(figure.dataset.of), visible).slice(0, MOST_FOREST);
      const svg = charts.forest(rows.map(([row, cell]) => ({
        label: row.label, path: section.table.dataset.root + cell.path, value: cell.value, low: cell.low, high: cell.high, baseline: row.baseline,
      })), asked.metric);
      const pinned = rows.some(([row, cell]) => row.baseline && Number.isFinite(cell.value));
      replaceFigure(figure, svg, svg
        ? "Mean over units with 95 % bootstrap intervals" + (pinned ? "; dashed: baseline." : ".")
        : "Fewer than two of the configurations that are left have a finite value.");
    },
    critical(section, data, figure, visible, questions) {
      const rows = data.rows.flatMap((row, place) =>
        (!row.baseline && row.positions === figure.dataset.positions && visible.has(row.id) ? [[row, place]] : []));
      const values = rows.map(([, place]) => questions.map((question) => {
        const cell = data.cell(place, question);
        if (!data.questions[question].how || !cell || cell.value === undefined) return NaN;
        return cell.value * (data.questions[question].lower ? 1 : -1);
      }));
      const scored = questions.map((question, at) => values.some((row) => !Number.isNaN(row[at])));
      const found = charts.critical(rows.map(([row]) => row.label), values.map((row) => row.filter((value, at) => scored[at])));
      if (!found) {
        replaceFigure(figure, null, "No mean ranks: fewer than three of the configurations that are left have a value on each of two tasks or more.");
        return;
      }
      const { tasks, criticalDifference, pValue, compared, drawn, leftOut } = found;
      replaceFigure(figure, found.svg, "Mean rank over " + tasks + " tasks, best at the left"
        + (figure.dataset.positions ? "; positions: " + figure.dataset.positions : "")
        + ". Bars join what Nemenyi’s test does not tell apart at 5 % (critical difference " + number(criticalDifference)
        + "; Friedman’s test over " + compared + " configurations: p = " + number(pValue) + ")."
        + (compared > drawn ? " The best " + drawn + " are drawn." : "")
        + (leftOut ? " " + leftOut + " without a value on every task " + (leftOut === 1 ? "is" : "are") + " left out." : ""));
    },
    heat(section, data, figure, visible, questions) {
      const rows = data.rows.flatMap((row, place) => (row.baseline || visible.has(row.id) ? [[row, place]] : []));
      const cells = rows.map(([, place]) => questions.map((question) => heatCell(section, data, place, question)));
      const found = charts.heat(rows.map(([row]) => row.label), questions.map((question) => {
        const { task, suffix, lower } = data.questions[question];
        return { name: suffix ? task + " " + suffix : task, lower };
      }), cells);
      replaceFigure(figure, found && found.svg, !found ? "Fewer than two configurations or tasks are left." : (found.againstBaseline
        ? "Blue: better than the first baseline; orange: worse; the fuller the colour, the larger the difference, on a scale of its own for each task."
        : "By place on each task: blue is best, orange is worst.")
        + (found.leftOut ? " " + found.leftOut + " more rows are in the table." : ""));
    },
    // Curves do not depend on one another: those of hidden rows are hidden.
    curves(section, data, figure, visible) {
      const stays = new Set([...visible, ...data.rows.filter((row) => row.baseline).map((row) => row.id)]);
      showLines(figure, (id) => stays.has(id));
    },
  };

  function showLines(figure, stays) {
    const lines = Array.from(figure.querySelectorAll("[data-line]"));
    for (const line of lines) line.toggleAttribute("hidden", !stays(line.dataset.line));
    figure.hidden = lines.every((line) => line.hasAttribute("hidden"));
  }

  function heatCell(section, data, place, question) {
    const cell = data.cell(place, question), { lower, how } = data.questions[question];
    if (!cell || cell.value === undefined || !how) return null;
    const better = cell.difference === undefined ? undefined : (lower ? -1 : 1) * cell.difference;
    return { value: cell.value, better, path: section.table.dataset.root + cell.path };
  }

  // Charts of one question follow the rows, those over all tasks the tasks as well.
  function drawCharts(section, data, wanted, restricted, visible) {
    const questions = section.tasks.flatMap((task, question) => (!wanted.tasks.size || wanted.tasks.has(task) ? [question] : []));
    for (const figure of section.charts) {
      const across = ["critical", "heat"].includes(figure.dataset.chart);
      if (restricted || (across && wanted.tasks.size)) draw[figure.dataset.chart](section, data, figure, visible, questions);
      else if (figure.dataset.chart === "curves") showLines(figure, () => true);
      else restoreFigure(figure);
    }
    if (section.compact) shadeCells(section, data, restricted, visible);
    for (const name of section.node.querySelectorAll(".missing [data-of]")) name.hidden = restricted && !visible.has(name.dataset.of);
    for (const line of section.node.querySelectorAll(".missing li:not([data-of])")) line.hidden = !line.querySelector("[data-of]:not([hidden])");
  }

  function shadeCells(section, data, restricted, visible) {
    for (const [cell, name] of section.shaded) cell.className = name;
    section.shaded.clear();
    if (!restricted) return;
    for (const { at, kind, question } of section.columns) {
      if (kind !== "value") continue;
      const rows = scoredRows(data, question, visible).map(([row]) => row);
      const found = charts.shades(rows.map((row) => heatCell(section, data, data.rows.indexOf(row), question)), data.questions[question].lower);
      rows.forEach((row, n) => {
        const line = section.lines.get(row.id), cell = line && line.cells[at];
        if (!cell) return;
        section.shaded.set(cell, cell.className);
        cell.className = ["m", "none"].includes(found[n]) ? "" : found[n];
      });
    }
  }

  function nameCharts() {
    for (const section of sections) {
      section.figures.forEach((figure) => {
        const svg = figure.querySelector("svg.chart");
        svg.dataset.name = section.node.id + "-" + figure.dataset.pareto;
        figure.querySelector(".axes").append(element("span", { class: "axes-note", role: "status" }));
        for (const select of figure.querySelectorAll("select[data-axis]")) {
          select.addEventListener("change", () => {
            site.state.set(axisName(select), select.value);
            site.save(true);
            update();
          });
        }
        figure.original = svg;
      });
    }
  }

  function axesChosen(figure) {
    const svg = figure.querySelector("svg.chart");
    return ["x.", "y."].some((axis) => site.state.has(axis + svg.dataset.name));
  }

  // --- all together ---------------------------------------------------------------------------------------------

  let turns = 0;

  const pause = () => new Promise((resolve) => { setTimeout(resolve); });

  async function update() {
    const turn = ++turns, wanted = chosen(), restricted = restricts(wanted);
    const open = sections.filter((section) => !wanted.model || section.node.id === wanted.model);
    for (const section of sections) {
      section.node.hidden = !open.includes(section);
      showColumns(section, wanted);
    }
    let shown = 0, all = 0, since = performance.now();
    try {
      for (const section of open) {
        const drawn = section.figures.filter((figure) => restricted || axesChosen(figure));
        for (const figure of section.figures) {
          const svg = figure.querySelector("svg.chart");
          if (!drawn.includes(figure) && svg !== figure.original) {
            svg.replaceWith(figure.original);
            figure.querySelector(".axes-note").textContent = "";
            writeLeftOut(figure, null);
          }
        }
        const fewer = restricted || (wanted.tasks.size > 0 && section.charts.length > 0);
        const data = fewer || drawn.length ? await load(section.table.dataset.root, section.table.dataset.src) : null;
        if (turn !== turns) return;
        if (!restricted) {
          for (const rows of section.rows.values()) for (const row of rows) row.hidden = false;
          restoreRanks(section);
        }
        const visible = new Set(data ? data.rows.filter((row) => !restricted || suits(row, wanted)).map((row) => row.id) : []);
        if (restricted) {
          const ranks = [];
          for (let question = 0; question < section.tasks.length; question++) {
            if (wanted.tasks.size && !wanted.tasks.has(section.tasks[question])) continue;
            ranks.push([question, ranksOf(section, data, question, visible)]);
            if (performance.now() - since < TURN) continue;
            await pause();
            since = performance.now();
            if (turn !== turns) return;
          }
          // Everything is written at once: the browser lays the table out again after each pause.
          for (const row of data.rows) {
            // Baselines stay: they have no rank, and differences are to them.
            for (const line of section.rows.get(row.id) || []) line.hidden = !row.baseline && !visible.has(row.id);
            if (row.baseline) continue;
            all += 1;
            if (visible.has(row.id)) shown += 1;
          }
          for (const [question, found] of ranks) writeRanks(section, data, question, found);
        }
        for (const figure of drawn) drawChart(section, data, figure, visible);
        drawCharts(section, data, wanted, restricted, visible);
        sort(section);
      }
    } catch (error) {
      status.textContent = "The data of this board cannot be loaded; it is shown unfiltered.";
      return;
    }
    status.textContent = restricted
      ? shown + " of " + all + " configurations; ranks and their intervals are among these."
      : unfiltered;
    document.documentElement.dataset.updated = String(turn);
  }

  // By what the reader has chosen, else by the first task that is shown.
  function sort(section) {
    const { state } = site, name = "sort." + section.table.id;
    const first = section.columns.find((column) => column.kind === "value" && !column.cell.hidden);
    const usual = section.columns.find((column) => section.order[column.at]);
    if (state.has(name) || !first || first === usual) {
      site.resort(section.table);
      return;
    }
    site.sort(section.table, first.cell, first.cell.dataset.sorts === "up");
  }

  // --- copying cells --------------------------------------------------------------------------------------------

  const opener = element("button", { type: "button", class: "cell-copy", "aria-haspopup": "menu", "aria-expanded": "false", "aria-label": "Copy this cell", title: "Copy this cell" }, "⋯");
  let menu = null;

  function offerCopy(event) {
    const cell = event.target.closest && event.target.closest("table.board tbody td");
    if (!cell || menu || cell.contains(opener)) return;
    const section = sections.find((each) => each.table.contains(cell));
    const column = section.columns[cell.cellIndex];
    if (column && column.kind === "value") cell.append(opener);
  }

  async function openMenu() {
    const cell = opener.closest("td"), section = sections.find((each) => each.table.contains(cell));
    const data = await load(section.table.dataset.root, section.table.dataset.src).catch(() => null);
    if (!data) {
      status.textContent = "The data of this board cannot be loaded.";
      return;
    }
    closeMenu(false);
    const question = section.columns[cell.cellIndex].question;
    const place = data.rows.findIndex((row) => row.id === cell.parentElement.dataset.row);
    const row = data.rows[place], result = data.cell(place, question) || {};
    const texts = [
      ["Value", result.value === undefined ? "" : String(result.value)],
      ["Command", result.command],
      ["LaTeX row", latexRow(section, data, place)],
      ["BibTeX", row.bibtex],
    ];
    menu = element("div", { role: "menu", class: "copy-menu", "aria-label": "Copy" });
    for (const [label, text] of texts) {
      const item = element("button", { type: "button", role: "menuitem", tabindex: "-1", "aria-disabled": text ? null : "true" },
        text ? label : label + " (none)");
      item.addEventListener("click", async () => {
        if (!text) return;
        const done = await site.copy(text, null);
        status.textContent = done ? label + " copied." : "The browser does not allow copying.";
        closeMenu(true);
      });
      menu.append(item);
    }
    document.body.append(menu);
    const at = opener.getBoundingClientRect();
    menu.style.left = Math.max(8, Math.min(at.left + scrollX, scrollX + document.documentElement.clientWidth - menu.offsetWidth - 8)) + "px";
    menu.style.top = at.bottom + scrollY + 2 + "px";
    opener.setAttribute("aria-expanded", "true");
    menu.addEventListener("keydown", steer);
    menu.firstElementChild.focus();
  }

  function steer(event) {
    const items = Array.from(menu.children), at = items.indexOf(document.activeElement);
    const to = { ArrowDown: (at + 1) % items.length, ArrowUp: (at + items.length - 1) % items.length, Home: 0, End: items.length - 1 }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      items[to].focus();
    } else if (event.key === "Escape" || event.key === "Tab") {
      event.preventDefault();
      closeMenu(true);
    }
  }

  function closeMenu(back) {
    if (!menu) return;
    menu.remove();
    menu = null;
    opener.setAttribute("aria-expanded", "false");
    if (back && opener.isConnected) opener.focus();
  }

  const LATEX = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}" };

  function latexText(text) {
    return text.replace(/[\\~^&%$#_{}]/g, (letter) => LATEX[letter] || "\\" + letter);
  }

  function latexNumber(value) {
    if (value === undefined || Number.isNaN(value)) return "--";
    if (!Number.isFinite(value)) return value > 0 ? "$\\infty$" : "$-\\infty$";
    const text = number(value).replaceAll("−", "-").replaceAll(",", "\\,");
    const [mantissa, exponent] = text.split("e");
    return "$" + mantissa + (exponent === undefined ? "" : "\\times 10^{" + exponent + "}") + "$";
  }

  function latexRow(section, data, place) {
    const parts = [latexText(data.rows[place].label)];
    for (const { kind, question, cell } of section.columns) {
      if (kind !== "value" || cell.hidden) continue;
      const result = data.cell(place, question) || {};
      const interval = Number.isFinite(result.low) && Number.isFinite(result.high)
        ? " (" + latexNumber(result.low) + " to " + latexNumber(result.high) + ")" : "";
      parts.push(latexNumber(result.value) + interval);
    }
    return parts.join(" & ") + " \\\\";
  }

  // --- start ----------------------------------------------------------------------------------------------------

  nameCharts();
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    take(event.target);
    // Letters typed one after another are one step.
    site.save(!["search", "number"].includes(event.target.type));
    update();
  });
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    for (const name of ["q", "model", "storage", "bits-min", "bits-max", "task", "hide"]) site.state.delete(name);
    site.save(true);
    showState();
    update();
  });
  site.follow(() => {
    showState();
    update();
  });
  document.addEventListener("focusin", offerCopy);
  document.addEventListener("pointerover", offerCopy);
  opener.addEventListener("click", () => (menu ? closeMenu(true) : openMenu()));
  document.addEventListener("pointerdown", (event) => {
    if (menu && !menu.contains(event.target) && event.target !== opener) closeMenu(false);
    for (const open of document.querySelectorAll("details.menu[open]")) if (!open.contains(event.target)) open.open = false;
  });
  document.addEventListener("keydown", (event) => {
    const open = event.key === "Escape" && document.querySelector("details.menu[open]");
    if (!open) return;
    open.open = false;
    open.querySelector("summary").focus();
  });
  showState();
  if (site.state.toString()) update();
})();
