// Shows the run named in the address, on sites with too many runs for a page each.
(function () {
  "use strict";

  const SHARDS = 256;
  const UNSAFE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;
  const loaded = new Map();
  const waiting = new Map();

  // FNV-1a over UTF-8 bytes, as the builder computes it.
  function shardOf(id) {
    let state = 0x811c9dc5;
    for (const byte of new TextEncoder().encode(id)) state = Math.imul(state ^ byte, 0x01000193) >>> 0;
    return state % SHARDS;
  }

  window.methodbenchShard = async function (shard, packed) {
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const runs = await new Response(stream).json();
    loaded.set(shard, runs);
    const { resolve } = waiting.get(shard) || {};
    if (resolve) resolve(runs);
  };

  function load(shard) {
    if (loaded.has(shard)) return Promise.resolve(loaded.get(shard));
    return new Promise((resolve, reject) => {
      waiting.set(shard, { resolve });
      const script = document.createElement("script");
      script.src = "data/runs/" + shard.toString(16).padStart(2, "0") + ".js";
      script.onerror = () => reject(new Error("no data"));
      document.head.append(script);
    });
  }

  function harmless(text) {
    return String(text).replace(UNSAFE, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
  }

  function element(name, attributes, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
    made.append(...children.map((child) => (child instanceof Node ? child : harmless(child))));
    return made;
  }

  function plain(value) {
    return value === null || value === undefined ? "none" : typeof value === "object" ? JSON.stringify(value) : value;
  }

  function number(value) {
    if (typeof value === "string") return value;
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size >= 1e6 || size < 1e-4)) return value.toExponential(2).replace("e+", "e").replaceAll("-", "−");
    if (size >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
    return value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : size >= 1 ? 3 : 4).replace("-", "−");
  }

  function facts(pairs, wide) {
    if (!pairs.length) return element("p", { class: "note" }, "None.");
    return element("dl", { class: wide ? "facts wide" : "facts" },
      ...pairs.map(([name, value]) => element("div", {},
        element("dt", {}, element("bdi", {}, name)),
        element("dd", {}, value instanceof Node ? value : element("bdi", {}, plain(value))))));
  }

  const section = (title, ...content) => element("section", {}, element("h2", {}, title), ...content);

  function metricTable(metrics) {
    const head = ["Metric", "Value", "95 % interval", "Better", "Units"];
    const row = (metric) => element("tr", {},
      element("th", { scope: "row" }, (metric.title || metric.name) + (metric.unit ? " (" + metric.unit + ")" : "")),
      element("td", { class: "num" }, number(metric.value)),
      element("td", {}, metric.low === null || metric.high === null ? "" : number(metric.low) + " to " + number(metric.high)),
      element("td", {}, metric.direction),
      element("td", { class: "num" }, metric.units));
    return element("div", { class: "scroll" }, element("table", { class: "plain" },
      element("caption", { class: "hidden" }, "Metrics of this run"),
      element("thead", {}, element("tr", {}, ...head.map((title) => element("th", { scope: "col" }, title)))),
      element("tbody", {}, ...metrics.map(row))));
  }

  function witnesses(run) {
    if (!(run.witnesses || []).length) {
      return [element("p", { class: "note" }, "Nobody has made this run again yet. ", element("code", {}, "methodbench replay " + run.id),
        " does, and says whether the numbers are the same.")];
    }
    return [facts(run.witnesses.map((witness) => [witness.run_id,
      witness.verdict + ", " + witness.started_at.slice(0, 16).replace("T", " ") + " UTC" + (witness.parts_at ? "; parts at " + witness.parts_at : "")
      + witness.suspects.slice(0, 8).map((suspect) => "; " + suspect.field + ": " + plain(suspect.recorded) + " and " + plain(suspect.replayed)).join("")]), true)];
  }

  function show(id, found) {
    const run = found.run;
    const title = document.getElementById("run-title");
    title.replaceChildren(element("bdi", {}, run.method), " ", element("bdi", { class: "variant" }, run.variant), " ",
      element("span", { class: "light" }, "on " + run.task + (run.model ? ", " + run.model : "")));
    document.title = "Run " + id.slice(0, 12) + " · methodbench";
    const lede = document.getElementById("run-lede");
    lede.replaceChildren(element("span", { class: "status " + (run.status === "ok" ? "ok" : "bad") }, run.status),
      " Run ", element("code", {}, id), ", seed " + run.seed + ", " + run.started_at.slice(0, 16).replace("T", " ") + " UTC.");
    const board = document.getElementById("run-board");
    board.replaceChildren();
    if (found.board) board.append("· ", element("a", { href: found.board }, "Board"));
    const command = element("pre", { class: "copy" }, element("code", {}, run.command || "no command was recorded"));
    const identity = [["cell", run.cell_key], ["method’s source", run.method_digest], ["weights", run.weights_digest], ["data", run.data_digest]]
      .filter(([, value]) => value).map(([name, value]) => [name, element("code", {}, value)]);
    if (run.environment_digest) {
      identity.push(["environment", element("a", { href: "environments/" + run.environment_digest.slice(0, 16) + ".html" }, element("code", {}, run.environment_digest))]);
    }
    const cost = [["time", number(run.wall_seconds) + " s"],
      ...Object.entries(run.phases || {}).map(([name, value]) => ["· " + name, number(value) + " s"]),
      ["peak memory, bytes", run.peak_memory_bytes], ["storage", run.storage], ["size of the model, bytes", run.model_bytes],
      ["bits per weight, measured", run.bits_per_weight], ["bits per weight, accounted", run.accounted_bits],
      ["throughput", run.throughput === null ? null : number(run.throughput) + " " + run.throughput_unit],
    ].filter(([, value]) => value !== null && value !== undefined && value !== "");
    document.getElementById("run-body").replaceChildren(
      ...(run.stale ? [element("div", { class: "callout" }, element("h2", {}, "Stale"),
        element("p", {}, "Since this run was made: " + run.stale + ". It is kept, and its cell is run again with what there is today."))] : []),
      ...(run.reason ? [element("div", { class: "callout" }, element("h2", {}, "Reason"), element("p", { class: "text", tabindex: "0" }, run.reason))] : []),
      ...((run.warnings || []).length ? [element("div", { class: "callout" }, element("h2", {}, "Warnings"),
        element("ul", {}, ...run.warnings.map((warning) => element("li", {}, warning))))] : []),
      section("Metrics", run.metrics.length ? metricTable(run.metrics) : element("p", { class: "note" }, "No score.")),
      section("Repeat this", command),
      element("div", { class: "two" },
        section("Hyperparameters", facts(Object.entries(run.params || {}))),
        section("Settings, protocol " + run.protocol, facts(Object.entries(run.task_params || {}))),
        section("Cost", facts(cost)),
        section("Facts recorded", facts(Object.entries(run.facts || {})))),
      section("Witnesses", ...witnesses(run)),
      section("Identity", facts([...identity, ["machine", run.device + ", " + run.dtype + ", " + run.threads + " thread(s)"]], true)),
      ...(run.log_tail ? [section("End of the log", element("pre", { class: "log", tabindex: "0" }, run.log_tail))] : []));
  }

  async function open() {
    const id = decodeURIComponent(location.hash.slice(1));
    const lede = document.getElementById("run-lede");
    if (!id) { lede.textContent = "No run is named in the address."; return; }
    try {
      const runs = await load(shardOf(id));
      if (Object.hasOwn(runs, id)) show(id, runs[id]);
      else lede.textContent = "No run " + harmless(id) + " on this site.";
    } catch (error) {
      lede.textContent = "The data of this run cannot be loaded.";
    }
  }

  addEventListener("hashchange", open);
  open();
})();
