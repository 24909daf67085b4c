// Loads tables of boards as the builder has written them, and puts numbers as the pages do.
(function () {
  "use strict";

  const waiting = new Map(), promises = new Map();

  async function inflate(packed) {
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")));
  }

  // The bytes of the numbers lie grouped by their place within a number.
  function unshuffled(bytes) {
    const count = bytes.length / 8, plain = new Uint8Array(bytes.length);
    for (let place = 0; place < 8; place++) {
      for (let n = 0; n < count; n++) plain[n * 8 + place] = bytes[place * count + n];
    }
    const view = new DataView(plain.buffer), numbers = new Float64Array(count);
    for (let n = 0; n < count; n++) numbers[n] = view.getFloat64(n * 8, true);
    return numbers;
  }

  window.methodbenchTable = async function (name, packedTable, packedScores) {
    const { resolve, reject } = waiting.get(name) || {};
    if (!resolve) return;
    try {
      const table = await (await inflate(packedTable)).json();
      const scores = unshuffled(new Uint8Array(await (await inflate(packedScores)).arrayBuffer()));
      table.at = new Map();
      for (const cell of table.cells) {
        for (const field of ["value", "low", "high", "difference"]) if (field in cell) cell[field] = Number(cell[field]);
        for (const other of Object.values(cell.others || {})) other.value = Number(other.value);
        if ("at" in cell) cell.scores = scores.subarray(cell.at, cell.at + cell.units);
        table.at.set(cell.row + "/" + cell.question, cell);
      }
      table.cell = (row, question) => table.at.get(row + "/" + question);
      resolve(table);
    } catch (error) {
      reject(error);
    }
  };

  function addScript(src, reject) {
    const script = document.createElement("script");
    script.src = src;
    script.onerror = () => reject(new Error("cannot load " + src));
    document.head.append(script);
  }

  // The table at a path within the site; root leads to the site from the page.
  function load(root, path) {
    if (!promises.has(path)) {
      promises.set(path, new Promise((resolve, reject) => {
        waiting.set(path.replace(/^data\//, "").replace(/\.js$/, ""), { resolve, reject });
        addScript(root + path, reject);
      }));
    }
    return promises.get(path);
  }

  function loadIndex(root) {
    return new Promise((resolve, reject) => {
      window.methodbenchIndex = resolve;
      addScript(root + "data/boards.js", reject);
    });
  }

  function number(value) {
    if (value === null || value === undefined) return "–";
    if (Number.isNaN(value)) return "not a number";
    if (!Number.isFinite(value)) return "diverged (" + (value > 0 ? "" : "−") + "inf)";
    const size = Math.abs(value);
    if (size === 0) return "0";
    let text;
    if (size >= 1e6 || size < 1e-4) text = value.toExponential(2).replace("e+", "e");
    else if (size >= 1000) text = value.toLocaleString("en", { maximumFractionDigits: 0 });
    else text = value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : size >= 1 ? 3 : 4);
    return text.replaceAll("-", "−");
  }

  function signed(value) {
    return (Number.isFinite(value) && value > 0 ? "+" : "") + number(value);
  }

  // An element with attributes and children; texts stay texts.
  function element(name, attributes, ...children) {
    return filled(document.createElement(name), attributes, children);
  }

  function drawing(name, attributes, ...children) {
    return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
  }

  function filled(made, attributes, children) {
    for (const [key, value] of Object.entries(attributes || {})) {
      if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  window.methodbenchTables = { load, loadIndex, number, signed, element, drawing };
})();
