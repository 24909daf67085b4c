// The statistics of methodbench/stats.py in the browser: same seeds, same numbers, up to the rounding of sums.
// The random numbers are specified in that module. Scores are Float64Arrays; NaN marks a unit without a score.
(function () {
  "use strict";

  const DRAWS = 1000, LEVEL = 0.95, SEED = 7;
  const BOOTSTRAP = 0, PERMUTATION = 1;
  // Up to this many arrangements a permutation test counts all of them.
  const EXACT = 4096;
  // Aggregates that differ by less, relatively, are ties.
  const TIE = 1e-12;

  function keyOf(seed, stream) {
    return (seed + Math.imul(2654435769, stream)) >>> 0;
  }

  // Writes words 0 .. into.length-1 of a draw: pcg3d of (block, draw, key).
  function fillWords(into, draw, key) {
    const count = into.length;
    for (let block = 0, at = 0; at < count; block++) {
      let x = (Math.imul(block, 1664525) + 1013904223) | 0;
      let y = (Math.imul(draw, 1664525) + 1013904223) | 0;
      let z = (Math.imul(key, 1664525) + 1013904223) | 0;
      x = (x + Math.imul(y, z)) | 0;
      y = (y + Math.imul(z, x)) | 0;
      z = (z + Math.imul(x, y)) | 0;
      x ^= x >>> 16;
      y ^= y >>> 16;
      z ^= z >>> 16;
      x = (x + Math.imul(y, z)) | 0;
      y = (y + Math.imul(z, x)) | 0;
      z = (z + Math.imul(x, y)) | 0;
      into[at++] = x;
      if (at < count) into[at++] = y;
      if (at < count) into[at++] = z;
    }
  }

  function randomWords(seed, stream, draw, count) {
    const words = new Uint32Array(count);
    fillWords(words, draw, keyOf(seed, stream));
    return words;
  }

  // --- resamples ------------------------------------------------------------------------------------------------

  const kept = new Map();

  // How often each unit is in each draw, without the units that are in none: for draw d, the entries
  // start[d] .. start[d+1]-1 of unit and count.
  function resamples(units, draws, seed) {
    const name = units + "/" + draws + "/" + seed;
    if (kept.has(name)) return kept.get(name);
    const words = new Uint32Array(units), times = new Int32Array(units), key = keyOf(seed, BOOTSTRAP);
    const start = new Int32Array(draws + 1);
    let unit = new Int32Array(Math.ceil(draws * units * 0.7) + units), count = new Float64Array(unit.length), at = 0;
    for (let d = 0; d < draws; d++) {
      if (at + units > unit.length) {
        const more = new Int32Array(unit.length * 2), moreCounts = new Float64Array(more.length);
        more.set(unit);
        moreCounts.set(count);
        unit = more;
        count = moreCounts;
      }
      fillWords(words, d, key);
      times.fill(0);
      for (let p = 0; p < units; p++) times[Math.floor(words[p] * units / 4294967296)]++;
      for (let u = 0; u < units; u++) {
        if (times[u]) {
          unit[at] = u;
          count[at++] = times[u];
        }
      }
      start[d + 1] = at;
    }
    const made = { start, unit, count };
    // A few numbers of units are in use at a time; the oldest goes first.
    if (kept.size >= 4) kept.delete(kept.keys().next().value);
    kept.set(name, made);
    return made;
  }

  // Aggregates of bootstrap resamples, the same resamples for every row: Float64Array [draws * rows].
  function resampledAggregates(rows, how, options) {
    const { draws = DRAWS, seed = SEED } = options || {};
    const width = rows.length, units = width ? rows[0].length : 0;
    const found = new Float64Array(draws * width);
    if (!width) return found;
    if (how === "median") return resampledMedians(rows, draws, seed, found);
    if (how !== "mean" && how !== "exp-mean") {
      if (how !== "single") throw new RangeError("unknown aggregate " + how);
      const words = new Uint32Array(1);
      for (let d = 0; d < draws; d++) {
        fillWords(words, d, keyOf(seed, BOOTSTRAP));
        const first = Math.floor(words[0] * units / 4294967296);
        for (let m = 0; m < width; m++) found[d * width + m] = rows[m][first];
      }
      return found;
    }
    const { start, unit, count } = resamples(units, draws, seed);
    // Eight rows at a time, side by side for each unit, so that their sums stay in registers.
    const by = new Float64Array(units * 8);
    for (let first = 0; first < width; first += 8) {
      const some = Math.min(8, width - first);
      by.fill(0);
      for (let m = 0; m < some; m++) for (let u = 0; u < units; u++) by[u * 8 + m] = rows[first + m][u];
      for (let d = 0; d < draws; d++) {
        let s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0;
        for (let k = start[d], last = start[d + 1]; k < last; k++) {
          const n = count[k], at = unit[k] * 8;
          s0 += n * by[at];
          s1 += n * by[at + 1];
          s2 += n * by[at + 2];
          s3 += n * by[at + 3];
          s4 += n * by[at + 4];
          s5 += n * by[at + 5];
          s6 += n * by[at + 6];
          s7 += n * by[at + 7];
        }
        const at = d * width + first;
        found[at] = s0 / units;
        if (some > 1) found[at + 1] = s1 / units;
        if (some > 2) found[at + 2] = s2 / units;
        if (some > 3) found[at + 3] = s3 / units;
        if (some > 4) found[at + 4] = s4 / units;
        if (some > 5) found[at + 5] = s5 / units;
        if (some > 6) found[at + 6] = s6 / units;
        if (some > 7) found[at + 7] = s7 / units;
      }
    }
    if (how === "exp-mean") for (let at = 0; at < found.length; at++) found[at] = Math.exp(found[at]);
    return found;
  }

  function resampledMedians(rows, draws, seed, found) {
    const width = rows.length, units = rows[0].length, words = new Uint32Array(units), key = keyOf(seed, BOOTSTRAP);
    const drawn = new Float64Array(units);
    for (let d = 0; d < draws; d++) {
      fillWords(words, d, key);
      for (let p = 0; p < units; p++) words[p] = Math.floor(words[p] * units / 4294967296);
      for (let m = 0; m < width; m++) {
        const row = rows[m];
        for (let p = 0; p < units; p++) drawn[p] = row[words[p]];
        found[d * width + m] = median(drawn);
      }
    }
    return found;
  }

  // Sorts what it is given.
  function median(values) {
    values.sort();
    // NaN sorts last.
    if (Number.isNaN(values[values.length - 1])) return NaN;
    const half = values.length >> 1;
    return values.length % 2 ? values[half] : (values[half - 1] + values[half]) / 2;
  }

  // --- one method -----------------------------------------------------------------------------------------------

  function reduce(scores, how) {
    if (how === "single") return scores[0];
    if (how === "median") return median(Float64Array.from(scores));
    let sum = 0;
    for (let u = 0; u < scores.length; u++) sum += scores[u];
    if (how === "mean") return sum / scores.length;
    if (how === "exp-mean") return Math.exp(sum / scores.length);
    throw new RangeError("unknown aggregate " + how);
  }

  function scored(scores) {
    return scores.filter((score) => !Number.isNaN(score));
  }

  function aggregate(scores, how) {
    const finite = scored(scores);
    return finite.length ? reduce(finite, how) : NaN;
  }

  // Numbers of the sorted draws at which an interval ends.
  function ends(draws, level) {
    const tail = (1 - level) / 2, last = draws - 1;
    return [Math.floor(last * tail + 1e-9), Math.ceil(last * (1 - tail) - 1e-9)];
  }

  // Sorts what it is given.
  function percentiles(values, level) {
    values.sort();
    const [low, high] = ends(values.length, level);
    return [values[low], values[high]];
  }

  function bootstrapInterval(scores, how, options) {
    return differenceInterval(scores, null, how, options);
  }

  // Intervals of many rows of equal length, which share the resamples.
  function bootstrapIntervals(rows, how, options) {
    const { draws = DRAWS, level = LEVEL } = options || {};
    if (!rows.length || rows[0].length < 2 || how === "single") return rows.map(() => null);
    const whole = rows.filter((row) => !row.some(Number.isNaN));
    const drawn = resampledAggregates(whole, how, options), column = new Float64Array(draws);
    let place = 0;
    return rows.map((row) => {
      if (row !== whole[place]) return bootstrapInterval(row, how, options);
      for (let d = 0; d < draws; d++) column[d] = drawn[d * whole.length + place];
      place++;
      return percentiles(column, level);
    });
  }

  // --- two methods ----------------------------------------------------------------------------------------------

  function both(a, b) {
    if (a.length !== b.length) throw new RangeError("paired scores differ in length: " + a.length + " and " + b.length);
    const keep = (value, unit) => !Number.isNaN(a[unit]) && !Number.isNaN(b[unit]);
    return [a.filter(keep), b.filter(keep)];
  }

  // Interval of factors[0] * aggregate(a) - factors[1] * aggregate(b) + shift; b may be null.
  function differenceInterval(a, b, how, options) {
    const { draws = DRAWS, level = LEVEL, factors = [1, 1], shift = 0 } = options || {};
    const [first, second] = b === null ? [scored(a), null] : both(a, b);
    if (first.length < 2 || how === "single") return null;
    const drawn = resampledAggregates(second ? [first, second] : [first], how, options);
    const values = new Float64Array(draws);
    for (let d = 0; d < draws; d++) {
      const value = second
        ? factors[0] * drawn[2 * d] + shift - factors[1] * drawn[2 * d + 1]
        : factors[0] * drawn[d] + shift;
      // Two infinite aggregates differ by nothing that can be told.
      values[d] = Number.isNaN(value) ? 0 : value;
    }
    return percentiles(values, level);
  }

  function pairedDifference(a, b, how, options) {
    const [left, right] = both(a, b);
    if (!left.length) throw new RangeError("no unit was scored by both");
    const valueA = reduce(left, how), valueB = reduce(right, how);
    const [low, high] = differenceInterval(left, right, how, options) || [-Infinity, Infinity];
    const pValue = permutationTest(left.map((score, unit) => score - right[unit]), options);
    return { valueA, valueB, difference: valueA - valueB, low, high, pValue, units: left.length };
  }

  function permutationTest(differences, options) {
    const { draws = DRAWS, seed = SEED } = options || {};
    const units = differences.length;
    if (!units || !differences.every(Number.isFinite)) return NaN;
    let observed = 0;
    for (let u = 0; u < units; u++) observed += differences[u];
    observed = Math.abs(observed);
    if (!Number.isFinite(observed)) return NaN;
    // The tolerance counts arrangements that equal the observed one but for the order of summation.
    const bar = observed * (1 - 1e-12);
    const exact = Math.pow(2, units) <= EXACT, total = exact ? Math.pow(2, units) : draws;
    const words = new Int32Array(units), key = keyOf(seed, PERMUTATION);
    let extreme = 0;
    for (let d = 0; d < total; d++) {
      let sum = 0;
      if (exact) {
        for (let u = 0; u < units; u++) sum += (d >> u) & 1 ? differences[u] : -differences[u];
      } else {
        fillWords(words, d, key);
        // The highest bit of a word is the sign of the same word as an integer with sign.
        for (let u = 0; u < units; u++) sum += words[u] < 0 ? differences[u] : -differences[u];
      }
      if (Math.abs(sum) >= bar) extreme++;
    }
    return exact ? extreme / total : (extreme + 1) / (total + 1);
  }

  // --- several methods ------------------------------------------------------------------------------------------

  // Writes 1 + the number of methods that are better, for values[from .. from+order.length-1] times sign. order is
  // any order of the methods: the nearer to sorted, the faster; it is left sorted.
  function fillRanks(into, values, from, sign, order, sorted) {
    const count = order.length;
    for (let m = 0; m < count; m++) {
      const method = order[m], value = sign * values[from + method];
      if (Number.isNaN(value)) return fillRanksWithNaN(into, values, from, sign, order);
      let at = m;
      for (; at > 0 && sorted[at - 1] > value; at--) {
        sorted[at] = sorted[at - 1];
        order[at] = order[at - 1];
      }
      sorted[at] = value;
      order[at] = method;
    }
    let better = 0;
    for (let m = 0; m < count; m++) {
      const bar = beaten(sorted[m]);
      while (sorted[better] < bar) better++;
      into[order[m]] = 1 + better;
    }
  }

  // What a value must be below to be better than another: equal sums differ in their last bits.
  function beaten(value) {
    return Number.isFinite(value) ? value - TIE * Math.abs(value) : value;
  }

  function fillRanksWithNaN(into, values, from, sign, order) {
    for (const method of order) {
      const bar = beaten(sign * values[from + method]);
      let rank = 1;
      for (const other of order) if (sign * values[from + other] < bar) rank++;
      into[method] = rank;
    }
  }

  // Scores with NaN as the worst of all.
  function worstFilled(scores, lowerIsBetter) {
    const worst = lowerIsBetter ? Infinity : -Infinity;
    return scores.map((score) => (Number.isNaN(score) ? worst : score));
  }

  // [rank, lowest, highest] of each of the methods from their aggregates, drawn [draws * width] and point [width];
  // columns says which of the drawn ones take part. Without draws the intervals are the ranks.
  function ranksOfDraws(drawn, width, point, columns, lowerIsBetter, level) {
    const count = columns.length, sign = lowerIsBetter ? 1 : -1, draws = width && drawn ? drawn.length / width : 0;
    const ranks = new Int32Array(count), sorted = new Float64Array(count), order = new Int32Array(count);
    for (let m = 0; m < count; m++) order[m] = m;
    const values = Float64Array.from(columns, (column) => point[column]);
    fillRanks(ranks, values, 0, sign, order, sorted);
    const places = Int32Array.from(ranks);
    if (!draws) return Array.from(places, (place) => [place, place, place]);
    const seen = new Int32Array(count * (count + 1)), usual = Int32Array.from(order);
    for (let d = 0; d < draws; d++) {
      // Most draws are nearer to the order of the point estimates than to one another.
      order.set(usual);
      for (let m = 0, at = d * width; m < count; m++) values[m] = drawn[at + columns[m]];
      fillRanks(ranks, values, 0, sign, order, sorted);
      for (let m = 0; m < count; m++) seen[m * (count + 1) + ranks[m]]++;
    }
    const [first, last] = ends(draws, level);
    return Array.from(places, (place, m) => {
      let low = 0, high = 0;
      for (let rank = 1, sum = 0; rank <= count; rank++) {
        sum += seen[m * (count + 1) + rank];
        if (!low && sum > first) low = rank;
        if (!high && sum > last) high = rank;
      }
      return [place, Math.min(low, place), Math.max(high, place)];
    });
  }

  // [rank, lowest, highest] of each row of scores of the same units.
  function rankIntervals(rows, how, lowerIsBetter, options) {
    const { level = LEVEL } = options || {};
    const filled = rows.map((row) => worstFilled(row, lowerIsBetter));
    const point = Float64Array.from(filled, (row) => reduce(row, how));
    const resampled = filled.length && filled[0].length >= 2 && how !== "single";
    const drawn = resampled ? resampledAggregates(filled, how, options) : null;
    return ranksOfDraws(drawn, rows.length, point, rows.map((row, m) => m), lowerIsBetter, level);
  }

  // Which of the points [cost, loss] no other is at least as good as on both and better on one.
  function paretoFront(points) {
    return points.map(([cost, loss]) =>
      !points.some(([x, y]) => x <= cost && y <= loss && (x < cost || y < loss)));
  }

  // --- over tasks -----------------------------------------------------------------------------------------------

  // The complementary error function: a series of positive terms near zero, a continued fraction in the tail
  // (Abramowitz & Stegun 1964, 7.1.6 and 7.1.14).
  function erfc(x) {
    if (x < 0) return 2 - erfc(-x);
    if (x > 27) return 0;
    if (x < 2.5) {
      let term = 2 * x / Math.sqrt(Math.PI) * Math.exp(-x * x), sum = 0;
      for (let n = 1; term > 1e-17 * sum; n++) {
        sum += term;
        term *= 2 * x * x / (2 * n + 1);
      }
      return 1 - sum;
    }
    let fraction = x;
    for (let n = 80; n > 0; n--) fraction = x + n / 2 / fraction;
    return Math.exp(-x * x) / Math.sqrt(Math.PI) / fraction;
  }

  function chiSquareTail(statistic, degrees) {
    const half = statistic / 2, odd = degrees % 2;
    let tail = odd ? erfc(Math.sqrt(half)) : 0;
    let term = odd ? Math.exp(-half) * Math.sqrt(half / Math.PI) * 2 : Math.exp(-half);
    for (let step = 0; step < Math.floor(degrees / 2); step++) {
      tail += term;
      term *= half / ((odd ? 1.5 : 1) + step);
    }
    return Math.min(tail, 1);
  }

  const quantiles = new Map();

  // q such that the range of so many standard normals is at most q with probability level.
  function studentizedRangeQuantile(level, groups) {
    const name = level + "/" + groups;
    if (quantiles.has(name)) return quantiles.get(name);
    const steps = 1200, width = 18 / steps, normal = (z) => erfc(-z / Math.SQRT2) / 2;
    const grid = Float64Array.from({ length: steps + 1 }, (unused, n) => -9 + n * width), below = grid.map(normal);
    const probability = (q) => {
      let sum = 0;
      for (let n = 0; n <= steps; n++) {
        sum += Math.exp(-grid[n] * grid[n] / 2) * Math.pow(below[n] - normal(grid[n] - q), groups - 1);
      }
      return groups * width / Math.sqrt(2 * Math.PI) * sum;
    };
    // The false position (Illinois), which needs a quarter of the evaluations of bisection.
    let low = 0, high = 10, under = -level, over = probability(high) - level, q = high, side = 0;
    for (let n = 0; n < 60 && high - low > 1e-13 * high; n++) {
      q = (low * over - high * under) / (over - under);
      const off = probability(q) - level;
      if (Math.abs(off) < 1e-15) break;
      if (off < 0) [low, under, over] = [q, off, side < 0 ? over / 2 : over];
      else [high, over, under] = [q, off, side > 0 ? under / 2 : under];
      side = Math.sign(off);
    }
    quantiles.set(name, q);
    return q;
  }

  // Friedman's test with ties and Nemenyi's critical difference; rows are methods, columns tasks, lower is better.
  function friedman(rows, level) {
    const methods = rows.length, tasks = rows[0].length, meanRanks = new Float64Array(methods);
    let ties = 0;
    for (let task = 0; task < tasks; task++) {
      const order = Array.from(rows.keys()).sort((a, b) => rows[a][task] - rows[b][task] || a - b);
      for (let first = 0, last; first < methods; first = last) {
        last = first + 1;
        while (last < methods && rows[order[last]][task] === rows[order[first]][task]) last++;
        const count = last - first;
        for (let n = first; n < last; n++) meanRanks[order[n]] += (first + last + 1) / 2 / tasks;
        ties += count ** 3 - count;
      }
    }
    const around = meanRanks.reduce((sum, rank) => sum + (rank - (methods + 1) / 2) ** 2, 0);
    const correction = 1 - ties / (tasks * methods * (methods * methods - 1));
    const statistic = correction > 0 ? 12 * tasks / (methods * (methods + 1)) * around / correction : 0;
    return {
      statistic, pValue: chiSquareTail(statistic, methods - 1), meanRanks, tasks,
      criticalDifference: studentizedRangeQuantile(level === undefined ? LEVEL : level, methods) / Math.SQRT2
        * Math.sqrt(methods * (methods + 1) / (6 * tasks)),
    };
  }

  const api = {
    DRAWS, LEVEL, SEED, randomWords, resampledAggregates, aggregate, reduce, bootstrapInterval, bootstrapIntervals,
    differenceInterval, pairedDifference, permutationTest, rankIntervals, ranksOfDraws, worstFilled, paretoFront,
    chiSquareTail, erfc, friedman, studentizedRangeQuantile,
  };
  if (typeof module === "object" && module.exports) module.exports = api;
  else globalThis.methodbenchStats = api;
})();
