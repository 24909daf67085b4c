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

  // Quality against cost. points: {label, path, cost, quality, baseline, simulated}. Null where it would show nothing.
  function pareto(points, lower, labels, joined) {
    const drawn = points.filter((point) => Number.isFinite(point.cost) && Number.isFinite(point.quality));
    if (drawn.length < 2) return null;
    const box = { left: 56, right: 544, top: 26, bottom: 284 };
    const x = makeScale(drawn.map((point) => point.cost), box.left, box.right, 3);
    const y = makeScale(drawn.map((point) => point.quality), lower ? box.top : box.bottom, lower ? box.bottom : box.top, 12);
    if (!x || !y) return null;
    const sign = lower ? 1 : -1;
    const best = window.methodbenchStats.paretoFront(drawn.map((point) => [point.cost, sign * point.quality]));
    drawn.forEach((point, n) => {
      point.x = x(point.cost);
      point.y = y(point.quality);
      point.on = joined && best[n];
    });
    const words = (point) => point.label + ": " + number(point.quality) + " at " + number(point.cost) + (point.simulated ? " (simulated)" : "");
    const svg = frame("group", box, x, y, labels, labels.y + " against " + labels.x,
      "The better end of the vertical axis is at the top. " + drawn.map(words).join(". ") + ".");
    const front = drawn.filter((point) => point.on).sort((a, b) => a.x - b.x || a.y - b.y);
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

  window.methodbenchCharts = { pareto, scatter };
})();
