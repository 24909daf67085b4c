// Charts that scripts draw: the same look and scales as those that the builder draws.
(function () {
  "use strict";

  const { drawing, number } = window.methodbenchTables;
  const LARGEST = 1e300, CHARACTER = 6.8;

  function tickLabel(value) {
    const size = Math.abs(value);
    const text = size >= 1e5 || (size && size < 1e-3)
      ? value.toExponential(1).replace(".0e", "e").replace("e+", "e")
      : value.toLocaleString("en", { maximumSignificantDigits: 10 });
    return text.replaceAll("-", "−");
  }

  // A scale that shows every value: logarithmic where all are positive and far apart.
  function makeScale(values, start, end, logRatio) {
    const finite = values.filter((value) => Math.abs(value) <= LARGEST);
    if (!finite.length) return null;
    const first = finite.reduce((a, b) => Math.min(a, b)), last = finite.reduce((a, b) => Math.max(a, b)), pad = 0.06;
    const log = first > 0 && last / first > logRatio;
    let low, high;
    if (log) {
      const margin = Math.pow(last / first, pad);
      [low, high] = [first / margin, last * margin];
    } else {
      const size = Math.max(Math.abs(first), Math.abs(last));
      let width = last - first > 1e-9 * size ? last - first : 0.1 * size;
      if (!(width > 1 / LARGEST)) width = 1;
      [low, high] = [first - pad * width, last + pad * width];
    }
    const to = log ? Math.log10 : (value) => value;
    const scale = (value) => {
      const share = (to(log ? Math.max(value, low) : value) - to(low)) / (to(high) - to(low));
      return Math.round((start + Math.min(Math.max(share, 0), 1) * (end - start)) * 10) / 10;
    };
    scale.log = log;
    scale.ticks = (most) => tickValues(low, high, log, most);
    return scale;
  }

  function tickValues(low, high, log, most) {
    if (!log) {
      const raw = (high - low) / most, power = Math.pow(10, Math.floor(Math.log10(raw)));
      const step = [1, 2, 5, 10].map((factor) => factor * power).find((factor) => factor >= raw);
      const found = [];
      for (let n = Math.ceil(low / step - 1e-9); n <= Math.floor(high / step + 1e-9); n++) {
        found.push(Number((n * step).toPrecision(12)));
      }
      return found;
    }
    let values = [];
    for (const digits of [[1, 1.5, 2, 3, 4, 5, 6, 8], [1, 2, 3, 5], [1, 2, 5], [1, 3], [1]]) {
      values = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
        for (const digit of digits) {
          const value = digit * Math.pow(10, power);
          if (value >= low && value <= high) values.push(value);
        }
      }
      if (values.length <= most + 1) return values;
    }
    const step = Math.ceil(values.length / most);
    return values.filter((value, place) => place % step === 0);
  }

  let made = 0;

  // An empty chart with axes; box is where points go. A chart with links is a group, which holds them, not a picture.
  function frame(role, box, x, y, labels, title, description) {
    const name = "drawn-" + (++made), height = box.bottom + 46, width = box.right + 16;
    const svg = drawing("svg", { class: "chart", viewBox: "0 0 " + width + " " + height, role, "aria-labelledby": name + "-t " + name + "-d" },
      drawing("title", { id: name + "-t" }, title), drawing("desc", { id: name + "-d" }, description));
    for (const value of y.ticks(5)) {
      svg.append(drawing("line", { class: "grid", x1: box.left, x2: box.right, y1: y(value), y2: y(value) }),
        drawing("text", { class: "tick end", x: box.left - 6, y: y(value) + 4 }, tickLabel(value)));
    }
    for (const value of x.ticks(7)) {
      svg.append(drawing("line", { class: "grid", x1: x(value), x2: x(value), y1: box.bottom, y2: box.bottom + 4 }),
        drawing("text", { class: "tick mid", x: x(value), y: box.bottom + 17 }, tickLabel(value)));
    }
    svg.append(drawing("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
      drawing("text", { class: "lab mid", x: (box.left + box.right) / 2, y: height - 8 }, labels.x + (x.log ? ", log scale" : "")),
      drawing("text", { class: "lab", x: box.left, y: 12 }, labels.y + (y.log ? ", log scale" : "") + (labels.better ? " (" + labels.better + ": up)" : "")));
    return svg;
  }

  // Quality against cost. points: {label, path, cost, quality, baseline, simulated, compared}. Null where it would show
  // nothing. Only what is compared may be on the front.
  function pareto(points, lower, labels) {
    const drawn = points.filter((point) => Number.isFinite(point.cost) && Number.isFinite(point.quality));
    if (drawn.length < 2) return null;
    const box = { left: 56, right: 544, top: 26, bottom: 284 };
    const x = makeScale(drawn.map((point) => point.cost), box.left, box.right, 3);
    const y = makeScale(drawn.map((point) => point.quality), lower ? box.top : box.bottom, lower ? box.bottom : box.top, 12);
    if (!x || !y) return null;
    const sign = lower ? 1 : -1;
    const compared = drawn.filter((point) => point.compared);
    const best = window.methodbenchStats.paretoFront(compared.map((point) => [point.cost, sign * point.quality]));
    const front = compared.filter((point, n) => best[n]);
    for (const point of drawn) {
      point.x = x(point.cost);
      point.y = y(point.quality);
      point.on = front.includes(point);
    }
    front.sort((a, b) => a.x - b.x || a.y - b.y);
    const words = (point) => point.label + ": " + number(point.quality) + " at " + number(point.cost) + (point.simulated ? " (simulated)" : "");
    const svg = frame("group", box, x, y, labels, labels.y + " against " + labels.x,
      "The better end of the vertical axis is at the top. " + drawn.map(words).join(". ") + ".");
    if (front.length > 1) {
      svg.append(drawing("path", { class: "front", d: "M" + front[0].x + "," + front[0].y
        + front.slice(1).map((point) => "H" + point.x + "V" + point.y).join("") }));
    }
    const order = [...drawn].sort((a, b) => a.on - b.on);
    for (const point of order) {
      const shared = { class: (point.on ? "on" : "off") + (point.baseline ? " base" : "") };
      const mark = point.simulated
        ? drawing("rect", { ...shared, x: point.x - 4.5, y: point.y - 4.5, width: 9, height: 9 }, drawing("title", {}, words(point)))
        : drawing("circle", { ...shared, cx: point.x, cy: point.y, r: 4.5 }, drawing("title", {}, words(point)));
      svg.append(drawing("a", { href: point.path, "aria-label": words(point) }, mark));
    }
    const lines = front.slice(1).flatMap((point, n) => [
      [front[n].x, front[n].y - 1, point.x, front[n].y + 1],
      [point.x - 1, Math.min(front[n].y, point.y), point.x + 1, Math.max(front[n].y, point.y)],
    ]);
    placeLabels(svg, order.reverse(), box, lines);
    return svg;
  }

  // Labels where they cover neither a point, a line nor one another.
  function placeLabels(svg, points, box, lines) {
    const taken = [...points.map(({ x, y }) => [x - 5, y - 5, x + 5, y + 5]), ...lines];
    const meets = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
    points.forEach((point, n) => {
      const label = point.label.length > 32 ? point.label.slice(0, 31) + "…" : point.label;
      const width = CHARACTER * label.length;
      for (const [dx, dy, end] of [[8, 4, false], [-8, 4, true], [6, -8, false], [-6, -8, true], [6, 16, false], [-6, 16, true]]) {
        const start = point.x + dx - (end ? width : 0);
        const area = [start, point.y + dy - 10, start + width, point.y + dy + 3];
        if (area[0] < box.left || area[2] > box.right + 14 || area[1] < box.top - 12 || area[3] > box.bottom) continue;
        if (taken.some((other, m) => m !== n && meets(area, other))) continue;
        taken.push(area);
        svg.append(drawing("text", { class: end ? "name end" : "name", x: point.x + dx, y: point.y + dy }, label));
        break;
      }
    });
  }

  // Per-unit scores of two configurations against each other, with the line where they are equal.
  function scatter(a, b, labels) {
    const units = Array.from(a, (score, unit) => [score, b[unit], unit])
      .filter(([x, y]) => Math.abs(x) <= LARGEST && Math.abs(y) <= LARGEST);
    if (units.length < 2) return null;
    const box = { left: 56, right: 344, top: 26, bottom: 314 }, all = units.flatMap(([x, y]) => [x, y]);
    const x = makeScale(all, box.left, box.right, 12), y = makeScale(all, box.bottom, box.top, 12);
    const svg = frame("img", box, x, y, labels, labels.y + " against " + labels.x + ", unit by unit",
      units.length + " units; on the dashed line both score the same.");
    svg.append(drawing("line", { class: "ref", x1: box.left, y1: box.bottom, x2: box.right, y2: box.top }));
    // Equal pairs are one mark, the larger the more there are.
    const marks = new Map();
    for (const [left, right, unit] of units) {
      const at = x(left) + "," + y(right), mark = marks.get(at) || { left, right, unit, count: 0 };
      mark.count += 1;
      marks.set(at, mark);
    }
    for (const { left, right, unit, count } of marks.values()) {
      svg.append(drawing("circle", { class: "unit", cx: x(left), cy: y(right), r: Math.min(14, 2 + Math.sqrt(count)) },
        drawing("title", {}, (count > 1 ? count + " units" : "unit " + unit) + ": " + number(left) + " and " + number(right))));
    }
    return svg;
  }

  const cut = (text, length) => (text.length > length ? text.slice(0, length - 1).trimEnd() + "…" : text);

  // An empty chart without a frame, named by its title and description.
  function picture(role, width, height, title, description, attributes) {
    const name = "drawn-" + (++made);
    return drawing("svg", { class: "chart", viewBox: "0 0 " + width + " " + height, role, "aria-labelledby": name + "-t " + name + "-d", ...attributes },
      drawing("title", { id: name + "-t" }, title), drawing("desc", { id: name + "-d" }, description));
  }

  function name(text, length, attributes) {
    return drawing("text", { class: "name", ...attributes }, cut(text, length), drawing("title", {}, text));
  }

  // Values with their intervals below one another. items: {label, path, value, low, high, baseline}.
  function forest(items, label) {
    if (items.filter((item) => Number.isFinite(item.value)).length < 2) return null;
    const width = 560, height = 50 + 22 * items.length;
    const left = Math.min(196, 16 + CHARACTER * Math.max(...items.map((item) => item.label.length))), right = width - 66;
    const has = (item) => Number.isFinite(item.low) && Number.isFinite(item.high);
    const x = makeScale(items.flatMap((item) => [item.value, ...(has(item) ? [item.low, item.high] : [])]), left, right, 12);
    if (!x) return null;
    const words = (item) => item.label + ": " + number(item.value) + (has(item) ? ", " + number(item.low) + " to " + number(item.high) : "");
    const svg = picture("group", width, height, label + " with 95 % intervals", items.map(words).join(". ") + ".");
    const pinned = items.find((item) => item.baseline && Number.isFinite(item.value));
    if (pinned) svg.append(drawing("line", { class: "ref", x1: x(pinned.value), x2: x(pinned.value), y1: 10, y2: height - 36 }));
    items.forEach((item, place) => {
      const y = 24 + 22 * place, base = item.baseline ? " base" : "";
      svg.append(name(item.label, 26, { class: "name end", x: left - 10, y: y + 4 }),
        drawing("line", { class: "rail", x1: left, x2: right, y1: y, y2: y }));
      if (!Number.isFinite(item.value)) {
        svg.append(drawing("text", { class: "tick", x: left + 4, y: y - 2 }, number(item.value)));
        return;
      }
      const [low, high] = has(item) ? [item.low, item.high] : [item.value, item.value];
      svg.append(drawing("a", { href: item.path, "aria-label": words(item) },
        drawing("line", { class: "iv" + base, x1: x(low), x2: x(high), y1: y, y2: y }),
        drawing("circle", { class: "pt" + base, cx: x(item.value), cy: y, r: 4 }, drawing("title", {}, words(item)))),
      drawing("text", { class: "tick", x: right + 8, y: y + 4 }, number(item.value)));
    });
    for (const value of x.ticks(4)) svg.append(drawing("text", { class: "tick mid", x: x(value), y: height - 20 }, tickLabel(value)));
    svg.append(drawing("text", { class: "lab mid", x: (left + right) / 2, y: height - 3 }, label + (x.log ? ", log scale" : "")));
    return svg;
  }

  const MOST_RANKED = 24;

  // Mean ranks over tasks, and which Nemenyi's test does not tell apart. values [methods][tasks], lower is better.
  function critical(labels, values) {
    const whole = values.flatMap((row, place) => (row.some(Number.isNaN) ? [] : [place]));
    if (!values.length || values[0].length < 2 || whole.length < 3) return null;
    const found = window.methodbenchStats.friedman(whole.map((place) => values[place]));
    const all = whole.map((place, n) => ({ label: labels[place], rank: found.meanRanks[n] }));
    // Ranks that are equal but for the order of summation are in the order of their labels.
    const shown = all.sort((a, b) => (Math.abs(a.rank - b.rank) > 1e-9 ? a.rank - b.rank : a.label < b.label ? -1 : 1)).slice(0, MOST_RANKED);
    const groups = [];
    shown.forEach((first, a) => {
      let b = a;
      while (b + 1 < shown.length && shown[b + 1].rank - first.rank <= found.criticalDifference) b++;
      if (b > a && (!groups.length || b > groups[groups.length - 1][1])) groups.push([a, b]);
    });
    const width = 640, margin = 18 + CHARACTER * Math.min(26, Math.max(...shown.map((item) => item.label.length)));
    const left = margin, right = width - margin, axis = 52, levels = axis + 14 + 9 * groups.length, half = Math.ceil(shown.length / 2);
    const start = Math.floor(shown[0].rank), end = Math.max(Math.ceil(shown[shown.length - 1].rank), start + 1);
    const x = (value) => Math.round((left + (Math.min(Math.max(value, start), end) - start) / (end - start) * (right - left)) * 10) / 10;
    const named = ([a, b]) => shown.slice(a, b + 1).map((item) => item.label).join(", ");
    const svg = picture("img", width, levels + 10 + 20 * half, "Critical-difference diagram: mean rank over " + found.tasks + " tasks",
      shown.map((item) => item.label + ": " + number(item.rank)).join(". ") + ". " + groups.map((group) => "Not told apart: " + named(group) + ".").join(" "));
    svg.append(drawing("line", { class: "iv base", x1: left, x2: x(start + found.criticalDifference), y1: 18, y2: 18 }),
      drawing("text", { class: "lab", x: left, y: 11 }, "critical difference " + number(found.criticalDifference)),
      drawing("line", { class: "axis", x1: left, x2: right, y1: axis, y2: axis }));
    for (const value of tickValues(start, end, false, 8)) {
      svg.append(drawing("line", { class: "axis", x1: x(value), x2: x(value), y1: axis - 5, y2: axis }),
        drawing("text", { class: "tick mid", x: x(value), y: axis - 9 }, tickLabel(value)));
    }
    shown.forEach(({ label, rank }, place) => {
      const near = place < half, y = levels + 10 + 20 * (near ? place : shown.length - 1 - place);
      svg.append(drawing("path", { class: "lead", d: "M" + x(rank) + "," + axis + "V" + y + "H" + (near ? left - 6 : right + 6) }),
        name(label, 26, { class: near ? "name end" : "name", x: near ? left - 10 : right + 10, y: y + 4 }));
    });
    groups.forEach(([a, b], level) => {
      const y = axis + 14 + 9 * level;
      svg.append(drawing("line", { class: "clique", x1: x(shown[a].rank) - 4, x2: x(shown[b].rank) + 4, y1: y, y2: y },
        drawing("title", {}, "Not told apart: " + named([a, b]))));
    });
    return { svg, ...found, compared: all.length, drawn: shown.length, leftOut: labels.length - all.length };
  }

  const SHADES = 3, MOST_LINES = 30;

  function shade(share) {
    const step = Math.min(SHADES, Math.floor(Math.abs(share) * SHADES + 0.5));
    return step ? (share > 0 ? "b" : "w") + step : "m";
  }

  // Linear between the sorted values, as the builder has it.
  function quantile(values, share) {
    const sorted = Float64Array.from(values).sort(), at = share * (sorted.length - 1), below = Math.floor(at);
    return below + 1 < sorted.length ? sorted[below] + (at - below) * (sorted[below + 1] - sorted[below]) : sorted[below];
  }

  // Shades of the cells {value, better} of one task, null where there is none: by the difference to the baseline on
  // both sides of zero, else by the place among the values.
  function shades(cells, lower) {
    const known = cells.filter((cell) => cell && !Number.isNaN(cell.value));
    const differences = known.flatMap((cell) => (cell.better === undefined ? [] : [Math.abs(cell.better)]));
    if (differences.length) {
      const sizes = differences.filter((size) => size <= LARGEST), reach = sizes.length ? Math.min(quantile(sizes, 0.9), 2 * quantile(sizes, 0.5)) : 0;
      return cells.map((cell) => {
        if (!known.includes(cell)) return "none";
        if (!Number.isFinite(cell.value)) return ((cell.value > 0) === lower ? "w" : "b") + SHADES;
        return shade(reach ? (cell.better || 0) / reach : 0);
      });
    }
    const order = [...new Set(known.map((cell) => cell.value))].sort((a, b) => (lower ? a - b || 0 : b - a || 0));
    return cells.map((cell) => {
      if (!known.includes(cell)) return "none";
      return order.length > 1 ? shade(1 - 2 * order.indexOf(cell.value) / (order.length - 1)) : "m";
    });
  }

  // Methods by tasks. columns: {name, lower}; cells [rows][columns] of {value, better, path} or null.
  function heat(labels, columns, cells) {
    if (labels.length < 2 || columns.length < 2) return null;
    const shown = labels.slice(0, MOST_LINES), byColumn = columns.map(({ lower }, c) => shades(cells.map((line) => line[c]), lower));
    const left = 16 + CHARACTER * Math.min(28, Math.max(...shown.map((label) => label.length))), width = 78, height = 26;
    const top = 20 + 0.72 * CHARACTER * Math.min(40, Math.max(...columns.map((column) => column.name.length)));
    const reach = 0.72 * CHARACTER * Math.min(40, columns[columns.length - 1].name.length);
    const whole = left + width * columns.length + Math.max(8, reach - width / 2);
    const svg = picture("group", whole, top + height * shown.length + 4, "Methods by tasks",
      "Values of " + shown.length + " configurations on " + columns.length + " tasks, as in the table above.", { class: "chart heat", width: whole });
    columns.forEach((column, c) => svg.append(name(column.name, 40, {
      transform: "translate(" + (left + width * (c + 0.5) - 6) + " " + (top - 6) + ") rotate(-40)" })));
    shown.forEach((label, r) => {
      svg.append(name(label, 28, { class: "name end", x: left - 8, y: top + height * r + 17 }));
      columns.forEach((column, c) => {
        const cell = cells[r][c], x = left + width * c, y = top + height * r;
        if (!cell) {
          svg.append(drawing("text", { class: "tick mid", x: x + width / 2, y: y + 17 }, "–"));
          return;
        }
        const said = Number.isFinite(cell.better)
          ? drawing("title", {}, number(Math.abs(cell.better)) + (cell.better < 0 ? " worse" : " better") + " than the baseline") : null;
        svg.append(drawing("a", { href: cell.path }, drawing("rect", { class: byColumn[c][r], x, y, width: width - 1, height: height - 1 }),
          drawing("text", { class: "name mid", x: x + width / 2, y: y + 17 }, cut(number(cell.value), 11), said)));
      });
    });
    return { svg, againstBaseline: cells.some((line) => line.some((cell) => cell && cell.better !== undefined)), leftOut: labels.length - shown.length };
  }

  window.methodbenchCharts = { pareto, scatter, forest, critical, heat, shades };
})();
