"use strict";
/* The script of an explanation's page. It solves the graph that is embedded in the page
   and shows what a span of the generated text comes from.

   In order: the data, the solve, the best paths, the texts, the view, what the reader
   does. Units are numbered as in Python, 0 .. N - 1 in reading order; "steps" number the
   generated units alone. All text reaches the document as text, never as markup. */
(() => {
  // --- the data -----------------------------------------------------------------------

  const told = JSON.parse(document.getElementById("data").textContent);
  const N = told.starts.length;
  const unitOf = Int32Array.from(told.generated); // unit of each step
  const G = unitOf.length;
  const stepOf = new Int32Array(N).fill(-1); // step of each unit, -1 for a source
  unitOf.forEach((unit, step) => { stepOf[unit] = step; });
  const special = new Set(told.special);
  const foiled = new Set(told.foiled);

  function decoded(text, Kind) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    return new Kind(bytes.buffer);
  }

  /** Numbers of 16 bits, as NumPy writes them, scaled so that the largest is 1. */
  function fromHalves(bits) {
    return Float64Array.from(bits, (half) => {
      const exponent = (half >> 10) & 31;
      const size = exponent ? (1 + (half & 1023) / 1024) * 2 ** (exponent - 15) : (half & 1023) * 2 ** -24;
      return (half & 0x8000 ? -size : size) / 2 ** 15;
    });
  }

  /** Columns from the gaps between them; a byte of 255 goes on in the next one. */
  function fromGaps(bytes, indptr) {
    const columns = new Uint32Array(indptr[indptr.length - 1]);
    let at = 0;
    for (let row = 0; row + 1 < indptr.length; row++) {
      let column = 0;
      for (let i = indptr[row]; i < indptr[row + 1]; i++) {
        while (bytes[at] === 255) column += bytes[at++];
        column += bytes[at++];
        columns[i] = column;
      }
    }
    return columns;
  }

  /** Rows of the graph in CSR form, with what of each leaks and what was left out. */
  function decodedRows(rows, count) {
    const leak = new Float64Array(count);
    for (const row of rows.leak) leak[row] = 1;
    const indptr = decoded(rows.indptr, Uint32Array);
    const columns = decoded(rows.columns, { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array }[rows.wide]);
    return {
      indptr,
      columns: told.compact ? fromGaps(columns, indptr) : columns,
      values: told.compact ? fromHalves(decoded(rows.values, Uint16Array)) : decoded(rows.values, Float64Array),
      leak,
      leftOut: rows.left_out ? decoded(rows.left_out, Float64Array) : new Float64Array(count),
    };
  }

  const rows = decodedRows(told.rows, G);
  // Rows by which an explanation starts, where a contrast makes them others.
  const first = told.first && { steps: told.first.steps, ...decodedRows(told.first, told.first.steps.length) };
  const firstRowOf = new Map(first ? first.steps.map((step, row) => [step, row]) : []);

  // --- the solve ----------------------------------------------------------------------

  /** Add one row, times the mass that goes by it, to the mass of each unit. */
  function spread(matrix, row, mass, into, magnitude) {
    const { columns, values } = matrix;
    for (let i = matrix.indptr[row]; i < matrix.indptr[row + 1]; i++) {
      into[columns[i]] += mass * (magnitude ? Math.abs(values[i]) : values[i]);
    }
  }

  /** The contrast holds only where everything that it is about is explained. */
  function holds(steps) {
    const chosen = new Set(steps);
    return [...foiled].every((step) => chosen.has(step));
  }

  const startsByFirstRows = (steps) => first !== null && holds(steps);

  /**
   * The mass of some steps along all paths, or along those with at most `hops` passes.
   *
   * Without a limit this is back substitution on (I - L)^T y = w: from the last unit to
   * the first, each hands on what has reached it, and nothing reaches it afterwards.
   *
   * Returns `mass`, which ends in each source and passes through each generated unit,
   * `left`, which was not followed further, and the own weight that started by a row of
   * its own. With `magnitude`, of the graph in absolute values.
   */
  function follow(steps, hops, magnitude = false) {
    const mass = new Float64Array(N);
    const left = new Float64Array(N);
    const startedFirst = new Float64Array(first ? first.steps.length : 0);
    const byFirst = startsByFirstRows(steps);
    const begin = new Float64Array(N); // own weights that go by the common rows
    const entering = new Float64Array(N); // what the first rows hand on
    for (const step of steps) {
      if (byFirst && firstRowOf.has(step)) {
        startedFirst[firstRowOf.get(step)] = 1;
        spread(first, firstRowOf.get(step), 1, entering, magnitude);
      } else begin[unitOf[step]] = 1;
    }
    if (hops === null) {
      for (let unit = 0; unit < N; unit++) mass[unit] = begin[unit] + entering[unit];
      for (let step = G - 1; step >= 0; step--) {
        const passing = mass[unitOf[step]];
        if (passing !== 0) spread(rows, step, passing, mass, magnitude);
      }
      return { mass, left, startedFirst };
    }
    let passing = begin;
    for (let pass = 0; pass <= hops; pass++) {
      const next = pass === 0 ? entering : new Float64Array(N);
      let any = false;
      for (let step = 0; step < G; step++) {
        const unit = unitOf[step];
        if (passing[unit] === 0) continue;
        mass[unit] += passing[unit];
        spread(rows, step, passing[unit], next, magnitude);
      }
      for (let unit = 0; unit < N; unit++) {
        if (stepOf[unit] < 0) {
          mass[unit] += next[unit];
          next[unit] = 0;
        } else if (next[unit] !== 0) any = true;
      }
      passing = next;
      if (!any) break;
    }
    left.set(passing);
    return { mass, left, startedFirst };
  }

  const sumOf = (values) => values.reduce((sum, value) => sum + value, 0);

  /** Everything about some steps, as Python's result has it. Arrays are by unit. */
  function solve(steps, hops) {
    const own = new Float64Array(N);
    for (const step of steps) own[unitOf[step]] = 1;
    const net = follow(steps, hops);
    const all = told.signed ? follow(steps, hops, true) : net;
    let leaked = 0;
    let unresolved = 0;
    for (let step = 0; step < G; step++) {
      const mass = net.mass[unitOf[step]];
      leaked += mass * rows.leak[step];
      unresolved += Math.abs(mass) * rows.leftOut[step] + Math.abs(net.left[unitOf[step]]);
    }
    net.startedFirst.forEach((mass, row) => {
      leaked += mass * first.leak[row];
      unresolved += mass * first.leftOut[row];
    });
    // What passes by the common rows; flows between units need it before first rows are added.
    const handed = { net: Float64Array.from(net.mass), all: Float64Array.from(all.mass), startedFirst: net.startedFirst };
    for (const one of new Set([net, all])) {
      one.startedFirst.forEach((mass, row) => { one.mass[unitOf[first.steps[row]]] += mass; });
    }
    const positive = net.mass.map((mass, unit) => Math.max((all.mass[unit] + mass) / 2, 0));
    const negative = net.mass.map((mass, unit) => Math.max((all.mass[unit] - mass) / 2, 0));
    // What arrives at a unit ends, passes through or stops there, less its own weight.
    const arrived = (signs) => signs.mass.map((mass, unit) => mass + signs.left[unit] - own[unit]);
    return {
      steps, handed, leaked, unresolved, total: steps.length,
      mass: net.mass, positive, negative, arrived: { net: arrived(net), all: arrived(all) },
    };
  }

  /** Visit the flow of mass along each edge: from a unit to an earlier one, net and in absolute values. */
  function eachFlow({ handed: { net, all, startedFirst } }, visit) {
    const along = (matrix, row, unit, netMass, allMass) => {
      for (let i = matrix.indptr[row]; i < matrix.indptr[row + 1]; i++) {
        visit(unit, matrix.columns[i], netMass * matrix.values[i], allMass * Math.abs(matrix.values[i]));
      }
    };
    for (let step = 0; step < G; step++) {
      const unit = unitOf[step];
      if (all[unit] !== 0) along(rows, step, unit, net[unit], all[unit]);
    }
    startedFirst.forEach((mass, row) => { if (mass) along(first, row, unitOf[first.steps[row]], mass, mass); });
  }

  /**
   * The mass that comes to each group of units from outside of it. The flow inside a
   * group is left out, or mass would count once for each unit that it passes through.
   */
  function arrivedIn(solved, groupOf, count) {
    const [net, all] = [new Float64Array(count), new Float64Array(count)];
    for (let unit = 0; unit < N; unit++) {
      net[groupOf[unit]] += solved.arrived.net[unit];
      all[groupOf[unit]] += solved.arrived.all[unit];
    }
    eachFlow(solved, (from, to, netFlow, allFlow) => {
      if (groupOf[from] !== groupOf[to]) return;
      net[groupOf[to]] -= netFlow;
      all[groupOf[to]] -= allFlow;
    });
    return { net, all };
  }

  // --- the best paths -----------------------------------------------------------------

  /** Put an entry into a list that is sorted by `compare`. */
  function insert(list, entry, compare) {
    let [low, high] = [0, list.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (compare(list[middle], entry) < 0) low = middle + 1;
      else high = middle;
    }
    list.splice(low, 0, entry);
  }

  /** Heavier first; of equal ones the shorter, then the smaller child, then its rank. */
  const ranking = (a, b) => b.weight - a.weight || a.length - b.length || a.child - b.child || a.rank - b.rank;

  /**
   * The k heaviest paths from some steps to the sources, exactly, as in Python's
   * solve.best_paths: every node keeps a sorted list of its best paths, which grows on
   * demand (Jimenez and Marzal, 1999). Products run from the source's end upwards, so
   * that they are the same numbers.
   */
  function bestPaths(steps, k) {
    if (!steps.length || !k) return [];
    const byFirst = startsByFirstRows(steps);
    // A unit with a first row is two nodes: one that paths pass through and, right after
    // it, one that they start from.
    const doubled = byFirst ? first.steps.map((step) => unitOf[step]) : [];
    const place = new Int32Array(N);
    for (let unit = 0, shift = 0; unit < N; unit++) {
      place[unit] = unit + shift;
      if (doubled[shift] === unit) shift++;
    }
    const root = N + doubled.length;
    const unitAt = new Int32Array(root);
    const startRow = new Map(); // node that starts by a first row -> that row
    for (let unit = 0; unit < N; unit++) unitAt[place[unit]] = unit;
    doubled.forEach((unit, row) => {
      unitAt[place[unit] + 1] = unit;
      startRow.set(place[unit] + 1, row);
    });
    const starts = [...steps].sort((a, b) => a - b)
      .map((step) => place[unitOf[step]] + (byFirst && firstRowOf.has(step) ? 1 : 0));

    function eachEdge(node, visit) {
      if (node === root) {
        for (const child of starts) visit(child, 1);
        return;
      }
      const matrix = startRow.has(node) ? first : rows;
      const row = startRow.has(node) ? startRow.get(node) : stepOf[unitAt[node]];
      const end = matrix.indptr[row + 1];
      for (let i = matrix.indptr[row]; i < end; i++) visit(place[matrix.columns[i]], matrix.values[i]);
    }

    const best = new Float64Array(root + 1);
    const length = new Int32Array(root + 1);
    const isSource = (node) => node < root && stepOf[unitAt[node]] < 0;
    for (let node = 0; node <= root; node++) {
      if (isSource(node)) {
        best[node] = 1;
        continue;
      }
      if (node < root && node > starts[starts.length - 1]) continue;
      eachEdge(node, (child, edge) => {
        const weight = Math.abs(edge) * best[child];
        if (weight === 0 || weight < best[node]) return;
        const edges = 1 + length[child];
        length[node] = weight > best[node] ? edges : Math.min(length[node], edges);
        best[node] = weight;
      });
    }
    if (best[root] === 0) return [];

    const lists = new Map(); // node -> { found, waiting, edge, ended }
    function open(node) {
      if (lists.has(node)) return lists.get(node);
      let list;
      if (isSource(node)) {
        list = { found: [{ weight: 1, length: 0, child: -1, rank: 0 }], waiting: [], edge: new Map(), ended: true };
      } else {
        const edge = new Map();
        const all = [];
        eachEdge(node, (child, value) => {
          edge.set(child, value);
          const weight = Math.abs(value) * best[child];
          if (weight > 0) all.push({ weight, length: 1 + length[child], child, rank: 0 });
        });
        const waiting = all.sort(ranking).slice(0, k); // of its edges only the k best can be needed
        list = { found: [waiting.shift()], waiting, edge, ended: false };
      }
      lists.set(node, list);
      return list;
    }

    /** Add the next path to a node's list; a loop, as a chain can outgrow the stack. */
    function grow(node) {
      const chain = [open(node)];
      for (;;) {
        const { found } = chain[chain.length - 1];
        const last = found[found.length - 1];
        const below = open(last.child);
        if (last.rank + 1 < below.found.length || below.ended) break;
        chain.push(below);
      }
      for (const list of chain.reverse()) {
        const last = list.found[list.found.length - 1];
        const after = open(last.child).found[last.rank + 1];
        if (after) {
          const weight = Math.abs(list.edge.get(last.child)) * after.weight;
          if (weight > 0) {
            insert(list.waiting, { weight, length: 1 + after.length, child: last.child, rank: last.rank + 1 }, ranking);
          }
        }
        if (list.waiting.length) list.found.push(list.waiting.shift());
        else list.ended = true;
      }
    }

    const top = open(root);
    while (top.found.length < k && !top.ended) grow(root);
    return top.found.slice(0, k).map((entry) => {
      const path = { units: [], weight: entry.weight };
      let node = root;
      while (entry.child >= 0) {
        if (open(node).edge.get(entry.child) < 0) path.weight = -path.weight;
        node = entry.child;
        path.units.push(unitAt[node]);
        entry = open(node).found[entry.rank];
      }
      path.share = path.weight / steps.length;
      return path;
    });
  }

  // --- the texts ----------------------------------------------------------------------

  const byId = (id) => document.getElementById(id);
  const boxes = [byId("source"), byId("generated")];
  const labelLayers = boxes.map(() => element("div", "labels"));

  function element(name, className = "", text = "") {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text) made.textContent = text;
    return made;
  }

  function drawn(name, attributes) {
    const made = document.createElementNS(byId("arcs").namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  // Characters that cannot be seen or that would rearrange the text: controls, format,
  // tag and bidirectional characters, line separators, blank letters, lone surrogates,
  // variation selectors in a row, which hide messages. White space as it stands stays,
  // and so do the joiners that scripts and emoji are written with.
  const ODD = new RegExp([
    String.raw`[^\P{C}\n\t\u200c\u200d]`,
    String.raw`[\u2028\u2029\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0]`,
    String.raw`(?<=[\u180b-\u180f\ufe00-\ufe0f\u{e0100}-\u{e01ef}])[\u180b-\u180f\ufe00-\ufe0f\u{e0100}-\u{e01ef}]`,
  ].join("|"), "gu");
  const codeOf = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

  /** Append text in which no character can hide. */
  function appendText(parent, text) {
    let done = 0;
    for (const match of text.matchAll(ODD)) {
      if (match[0] === "\r" && text[match.index + 1] === "\n") continue;
      parent.append(text.slice(done, match.index));
      parent.append(element("span", "odd", codeOf(match[0])));
      done = match.index + match[0].length;
    }
    parent.append(text.slice(done));
    return parent;
  }

  /** The same for places that take plain text only. */
  const plain = (text) => text.replace(ODD, codeOf);

  const sideOf = (unit) => (unit >= told.cut ? 1 : 0);
  const oneLine = (text) => text.replace(/\s+/g, " ").trim();

  function textOf(unit) {
    if (told.labels[unit] !== undefined) return told.labels[unit];
    return told.texts[sideOf(unit)].slice(told.starts[unit], told.stops[unit]);
  }

  /** Stretches of each text that belong to one unit, or to several that overlap. */
  const cells = [0, 1].map((side) => {
    const placed = [...Array(N).keys()].filter((unit) => sideOf(unit) === side && told.starts[unit] >= 0);
    placed.sort((a, b) => told.starts[a] - told.starts[b] || a - b);
    const found = [];
    for (const unit of placed) {
      const [start, stop] = [told.starts[unit], told.stops[unit]];
      const last = found[found.length - 1];
      if (last && start < last.stop) {
        last.units.push(unit);
        last.stop = Math.max(last.stop, stop);
      } else found.push({ start, stop, units: [unit], side });
    }
    return found;
  });

  /** What is shown and chosen as one: cells that are neighbours in one group. */
  function groupedCells(side, groups) {
    const found = [];
    for (const cell of cells[side]) {
      const group = groups ? groups[cell.units[0]] : null;
      const last = found[found.length - 1];
      if (groups && last && last.group === group) {
        last.stop = cell.stop;
        last.units.push(...cell.units);
      } else found.push({ ...cell, units: [...cell.units], group });
    }
    return found;
  }

  // Lines between fences, or indented by four and more, are code.
  const codeRanges = told.texts.map((text) => [
    ...[...text.matchAll(/^[ \t]*(```|~~~)[^\n]*\n[\s\S]*?(^[ \t]*\1[^\n]*$|(?![\s\S]))/gm)],
    ...[...text.matchAll(/^(?: {4,}|\t)\S[^\n]*$/gm)],
  ].map((match) => [match.index, match.index + match[0].length]));
  const isCode = (side, place) => codeRanges[side].some(([start, stop]) => start <= place && place < stop);

  // --- the view -----------------------------------------------------------------------

  const PATHS = 5;
  const LABELLED = 10; // units of each text whose number is written beside them
  const LEAST_LABELLED = 0.005;
  const MOST_ARCS = 60;
  const LEAST_ARC = 0.1; // of the heaviest path's share; lighter ones have arcs when they are pointed at
  const LONG_MAP = 24; // rows; a longer map leaves out those without mass

  const asked = told.explained;
  const state = {
    steps: [...asked],
    hops: told.hops,
    sign: "net",
    level: 0,
    keep: 0.8,
    paths: PATHS,
    lit: -1, // path that is pointed at
    pinned: -1, // path that was clicked
  };
  let answer; // of `solve`, for what is selected
  let direct; // the same without the graph
  let shown = []; // groups of units with their elements, in reading order
  const placeOf = new Int32Array(N); // of each unit, the number of its group
  let found = []; // best paths

  function percent(share) {
    const size = Math.abs(share);
    const sign = share < 0 ? "−" : "";
    if (size === 0) return "0%";
    if (size < 0.0005) return share < 0 ? ">−0.1%" : "<0.1%";
    const digits = size < 0.0995 ? 1 : 0;
    return `${sign}${(size * 100).toFixed(digits).replace(/\.0$/, "")}%`;
  }

  /** Masses of units or groups, as the switch for signs wants them. */
  function signed({ net, all }) {
    if (state.sign === "net") return net;
    const way = state.sign === "positive" ? 1 : -1;
    return net.map((mass, place) => Math.max((all[place] + way * mass) / 2, 0));
  }

  /** Write both texts into the page, one element for each group of units. */
  function writeTexts() {
    const { groups } = told.levels[state.level];
    shown = [];
    for (const side of [0, 1]) {
      const box = boxes[side];
      const text = told.texts[side];
      box.replaceChildren();
      const apart = [...Array(N).keys()].filter((unit) => sideOf(unit) === side && told.starts[unit] < 0);
      for (const unit of apart) {
        const group = appendGroup(box, { units: [unit], side, start: 0, stop: 0 }, textOf(unit));
        group.element.classList.add("apart");
      }
      if (apart.length) box.append("\n");
      let done = 0;
      for (const cell of groupedCells(side, groups)) {
        appendGap(box, side, done, cell.start);
        appendGroup(box, cell, text.slice(cell.start, cell.stop));
        done = Math.max(done, cell.stop);
      }
      appendGap(box, side, done, text.length);
      box.append(labelLayers[side]);
    }
    for (const side of [0, 1]) {
      const one = shown.find((group) => group.side === side && (side === 0 || group.steps.length));
      if (one) one.element.tabIndex = 0;
    }
  }

  function appendGap(box, side, start, stop) {
    if (start >= stop) return;
    const gap = element("span", isCode(side, start) ? "fixed code" : "fixed");
    box.append(appendText(gap, told.texts[side].slice(start, stop)));
  }

  function appendGroup(box, cell, text) {
    const steps = cell.units.filter((unit) => stepOf[unit] >= 0).map((unit) => stepOf[unit]);
    const made = element("span", "u");
    const blank = /^\s*$/.test(text);
    if (blank && /[\n\r]/.test(text)) made.append(element("span", "break", "⏎"));
    if (text === "") made.append(element("span", "odd", "∅"));
    // White space at its ends stays outside the shade, or lines would end in stubs of it.
    const start = blank ? 0 : /^(?:[ \t\n]|\r\n)*/.exec(text)[0].length;
    let end = text.length;
    while (!blank && " \t\n".includes(text[end - 1])) end -= text.slice(end - 2, end) === "\r\n" ? 2 : 1;
    const [before, inner, after] = [text.slice(0, start), text.slice(start, end), text.slice(end)];
    appendText(made, inner);
    if (isCode(cell.side, cell.start + text.search(/\S|$/))) made.classList.add("code");
    if (cell.units.every((unit) => special.has(unit))) made.classList.add("special");
    made.setAttribute("role", cell.side ? "option" : "listitem");
    if (cell.side && !steps.length) made.setAttribute("aria-disabled", "true"); // text from outside
    made.tabIndex = -1;
    const around = [before, after].map((space) => (space ? element("span", "space", space) : null));
    const group = { ...cell, steps, text, element: made, around, place: shown.length };
    made.dataset.place = group.place;
    shown.push(group);
    for (const unit of cell.units) placeOf[unit] = group.place;
    box.append(...[around[0], made, around[1]].filter(Boolean));
    return group;
  }

  /** The groups that hold a part of all mass, heaviest first. */
  function holding(groups, share) {
    const sorted = groups.filter((group) => group.mass !== 0).sort((a, b) => Math.abs(b.mass) - Math.abs(a.mass));
    const total = sumOf(sorted.map((group) => Math.abs(group.mass)));
    let held = 0;
    return sorted.filter((group) => {
      const wanted = held < share * total * (1 - 1e-12) || share === 1;
      held += Math.abs(group.mass);
      return wanted;
    });
  }

  function shade() {
    const [masses, alone] = [answer, direct].map((solved) => signed(arrivedIn(solved, placeOf, shown.length)));
    const chosen = new Set(state.steps);
    for (const group of shown) {
      group.mass = masses[group.place] / answer.total;
      group.direct = alone[group.place] / answer.total;
      group.chosen = group.steps.filter((step) => chosen.has(step)).length;
      group.selected = group.chosen > 0;
    }
    for (const side of [0, 1]) {
      const ours = shown.filter((group) => group.side === side);
      const heavy = holding(ours, state.keep);
      const largest = heavy.length ? Math.abs(heavy[0].mass) : 0;
      const rank = new Map(heavy.map((group, place) => [group, place]));
      for (const group of ours) dress(group, rank.get(group), largest);
    }
  }

  function dress(group, rank, largest) {
    const { element: made, mass } = group;
    group.rank = rank !== undefined && Math.abs(mass) >= LEAST_LABELLED ? rank : Infinity;
    const size = rank === undefined ? 0 : Math.abs(mass) / largest;
    const level = size === 0 ? 0 : 1 + [0.15, 0.35, 0.65].filter((from) => size >= from).length;
    const minus = size > 0 && (state.sign === "negative" || mass < 0);
    const isWholly = (other) => Boolean(other?.selected) && other.chosen === other.steps.length;
    const wholly = isWholly(group);
    const [before, after] = group.around;
    before?.classList.toggle("selected", wholly && isWholly(shown[group.place - 1]));
    after?.classList.toggle("selected", wholly && isWholly(shown[group.place + 1]));
    // Most units stay as they were, and to leave them alone is what makes a click fast.
    const look = `${size.toFixed(3)} ${minus} ${group.chosen}`;
    if (group.look === look) return;
    group.look = look;
    made.style.setProperty("--m", size.toFixed(3));
    for (const other of [1, 2, 3, 4]) made.classList.toggle(`l${other}`, other === level);
    made.classList.toggle("minus", minus);
    made.classList.toggle("selected", wholly);
    made.classList.toggle("partly", group.selected && !wholly);
    if (group.steps.length) made.setAttribute("aria-selected", group.selected);
  }

  /**
   * Write the numbers of the heaviest groups above them, each where there is room: in a
   * layer of their own, so that the text keeps its layout.
   */
  function writeLabels() {
    const prefix = { net: "", positive: "+", negative: "−" }[state.sign];
    for (const side of [0, 1]) {
      const box = boxes[side];
      const frame = box.getBoundingClientRect();
      const heavy = shown.filter((group) => group.side === side && group.rank < LABELLED).sort((a, b) => a.rank - b.rank);
      const placed = [];
      const labels = [];
      for (const { element: made, mass } of heavy) {
        const rects = [...made.getClientRects()];
        // A space at the end of a line is no place for the number of the word after it.
        const rect = rects.find((one) => one.width > 6) ?? rects[0];
        const text = prefix + percent(mass);
        if (!rect) continue;
        const [left, top, width] = [rect.left - frame.left + box.scrollLeft, rect.top - frame.top + box.scrollTop, 4 + text.length * 6.2];
        if (placed.some((other) => Math.abs(other.top - top) < 8 && left < other.left + other.width && other.left < left + width)) continue;
        placed.push({ left, top, width });
        const label = element("span", made.classList.contains("minus") ? "label minus" : "label", text);
        label.setAttribute("aria-hidden", "true");
        label.style.left = `${left - box.clientLeft}px`;
        label.style.top = `${top - box.clientTop - 9}px`;
        labels.push(label);
      }
      labelLayers[side].replaceChildren(...labels);
    }
  }

  /** Where the selection's text stands, as one or more stretches of whole units. */
  function selectedText() {
    const parts = [];
    let before = -2;
    for (const step of state.steps) {
      const unit = unitOf[step];
      const last = parts[parts.length - 1];
      const placed = told.starts[unit] >= 0;
      if (last && before === unit - 1 && placed && last.label === null) last.stop = Math.max(last.stop, told.stops[unit]);
      else parts.push({ start: told.starts[unit], stop: told.stops[unit], label: placed ? null : textOf(unit) });
      before = unit;
    }
    return parts.map((part) => part.label ?? told.texts[1].slice(part.start, part.stop)).join(" … ");
  }

  /** Where mass is that the switch for hops leaves open. */
  function beyond() {
    if (state.hops === null || answer.unresolved === 0) return "";
    if (state.hops === 0) return ": it stops at generated text";
    return `: it stops after ${state.hops} ${state.hops === 1 ? "hop" : "hops"}, or was left out`;
  }

  function tell() {
    const count = state.steps.length;
    const unit = told.levels[0].name;
    const { total } = answer;
    const text = selectedText();
    byId("selected").textContent = "";
    if (text === "") byId("selected").append(element("span", "odd", "∅"));
    appendText(byId("selected"), text.trim() || text);
    byId("contrast").hidden = !foiled.size || holds(state.steps);
    let [sources, against] = [0, 0];
    for (let one = 0; one < N; one++) {
      if (stepOf[one] >= 0) continue;
      sources += answer.positive[one];
      against += answer.negative[one];
    }
    const parts = [
      ["sources", sources / total], ["against", against / total],
      ["leak", Math.abs(answer.leaked) / total], ["open", answer.unresolved / total],
    ];
    const whole = Math.max(1, sumOf(parts.map(([, share]) => share)));
    byId("bar").replaceChildren(...parts.map(([name, share]) => {
      const part = element("i", name);
      part.style.width = `${(share / whole) * 100}%`;
      return part;
    }));
    const ends = told.signed
      ? `${percent(sources / total)} argues for it and ${percent(against / total)} against it, at the sources`
      : `${percent(sources / total)} ends in the sources`;
    const said = `Of the mass of ${count === 1 ? `this ${unit.replace(/s$/, "")}` : `these ${count} ${unit}`}, ${ends}; `
      + `${percent(answer.leaked / total)} leaks (rows with nothing ${told.signed ? "in them" : "positive"}); `
      + `${percent(answer.unresolved / total)} is unresolved${beyond()}.`;
    byId("balance").textContent = said;
    byId("bar").setAttribute("aria-label", said);
    byId("leak").textContent = percent(answer.leaked / total);
    byId("unresolved").textContent = percent(answer.unresolved / total);
    const grouping = byId("grouping");
    grouping.hidden = state.level === 0;
    grouping.textContent = `Shown in ${told.levels[state.level].name}: the masses of ${unit}, solved as ${unit}, are added up for display; what passes through generated text counts where it comes in. `
      + `An explanation whose units are ${told.levels[state.level].name} would give other numbers, as grouping before the solve is not the same as grouping after it.`;
    if (byId("cut")) {
      byId("cut").textContent = `The whole graph does not fit into this page, so it holds the heaviest entries of each row only, rounded down. `
        + `All numbers here are of that smaller graph. What it leaves out counts as unresolved: ${percent(solve(state.steps, null).unresolved / total)} of the mass of this selection.`;
    }
    legend();
  }

  function legend() {
    const box = byId("legend");
    box.replaceChildren();
    const swatch = (className, size, text) => {
      const made = element("span", `u ${className}`, text);
      made.style.setProperty("--m", size);
      box.append(made);
    };
    const largest = [0, 1].map((side) => Math.max(0, ...shown.filter((group) => group.side === side).map((group) => Math.abs(group.mass))));
    swatch("selected", 0, "selected");
    swatch("l1", 0.1, "little");
    swatch("l2", 0.25, "some");
    swatch("l3", 0.5, "much");
    swatch("l4", 1, "most");
    if (told.signed) swatch("l3 minus", 0.5, "− argues against");
    box.append(element("span", "", `Full shade: ${percent(largest[0])} in the prompt, ${percent(largest[1])} in the generated text.`));
  }

  // --- paths and arcs -----------------------------------------------------------------

  /** A path's units as sentences: neighbours in one sentence stand in it together. */
  function stations(path) {
    const parts = [];
    for (const unit of path.units) {
      const group = mapGroups[mapRowOf[unit]];
      const last = parts[parts.length - 1];
      if (mapLevel > 0 && last && last.group === group) last.units.push(unit);
      else parts.push({ group, units: [unit] });
    }
    return parts;
  }

  /** A text on one line, without its middle where it is long. */
  function shortened(text, longest) {
    const line = text.replace(/\s+/g, " ");
    const characters = [...line]; // whole ones, also where one takes two places
    if (characters.length <= longest) return line;
    const half = Math.floor(longest / 2);
    return `${characters.slice(0, half).join("")} … ${characters.slice(-half).join("")}`;
  }

  /** The words of a station; of a sentence of many units, those of the path stand out. */
  function words({ group, units }) {
    const made = element("span", "words");
    made.dir = "auto";
    if (group.units.length === 1 || told.starts[units[0]] < 0) {
      return appendText(made, shortened(textOf(units[0]), 240).trim() || JSON.stringify(textOf(units[0])));
    }
    const text = told.texts[group.side];
    const around = (from, to) => appendText(made, shortened(text.slice(from, to), 90));
    let done = group.start;
    for (const unit of [...units].sort((a, b) => told.starts[a] - told.starts[b])) {
      const [start, stop] = [Math.max(told.starts[unit], done), told.stops[unit]];
      const visible = start + Math.max(text.slice(start, stop).search(/\S/), 0);
      around(done, visible);
      made.append(appendText(element("b"), shortened(text.slice(visible, stop), 240)));
      done = Math.max(done, stop);
    }
    return around(done, group.stop);
  }

  function listPaths() {
    const list = byId("paths");
    list.replaceChildren();
    found.forEach((path, place) => {
      const item = element("li");
      const button = element("button", "path");
      button.type = "button";
      button.dataset.path = place;
      button.dataset.units = path.units.join(",");
      button.dataset.share = path.share;
      button.setAttribute("aria-pressed", "false");
      const share = element("span", "share", percent(path.share));
      if (path.weight < 0) share.append(element("small", "", "against"));
      const steps = element("span", "steps");
      stations(path).forEach((station, order) => {
        const step = element("span", "step");
        step.append(element("span", "from", order ? "←" : ""), words(station));
        steps.append(step);
      });
      button.append(share, steps);
      item.append(button);
      list.append(item);
    });
    if (!found.length) list.append(element("li", "small", "No path leads to a source: all of the mass leaks or is unresolved."));
    byId("more").disabled = found.length < state.paths;
  }

  function light(place) {
    state.lit = place;
    for (const group of shown) group.element.classList.remove("lit");
    const path = found[place];
    if (path) for (const unit of path.units) shown[placeOf[unit]].element.classList.add("lit");
    for (const button of byId("paths").querySelectorAll(".path")) {
      const own = Number(button.dataset.path);
      button.classList.toggle("lit", own === place);
      button.setAttribute("aria-pressed", own === state.pinned);
    }
  }

  function relight(place) {
    light(place);
    drawArcs();
  }

  /** The upper edge of a group's first line, within the part of its box that can be seen. */
  function anchor(group, frame) {
    const box = boxes[group.side].getBoundingClientRect();
    const [rect] = group.element.getClientRects();
    if (!rect) return null;
    const inside = (value, low, high) => Math.min(Math.max(value, low), high);
    return [
      inside(rect.left + Math.min(rect.width / 2, 60), box.left, box.right) - frame.left,
      inside(rect.top + 2, box.top + 4, box.bottom - 4) - frame.top,
    ];
  }

  function drawArcs() {
    const svg = byId("arcs");
    svg.replaceChildren();
    const frame = byId("texts").getBoundingClientRect();
    const order = found.map((_, place) => place).filter((place) => place !== state.lit);
    const isHeavy = (place) => Math.abs(found[place].share) >= LEAST_ARC * Math.abs(found[0].share);
    const drawnPaths = byId("arcs-on").checked && state.lit < 0 ? order.slice(0, PATHS).filter(isHeavy) : [];
    if (state.lit >= 0) drawnPaths.push(state.lit);
    const seen = new Set();
    for (const place of drawnPaths) {
      const path = found[place];
      for (let i = 1; i < path.units.length; i++) {
        const [from, to] = [shown[placeOf[path.units[i - 1]]], shown[placeOf[path.units[i]]]];
        if (from === to) continue;
        const key = `${from.place}-${to.place}`;
        if (seen.has(key)) continue;
        seen.add(key);
        const [a, b] = [anchor(from, frame), anchor(to, frame)];
        if (!a || !b) continue;
        // It leaves and arrives from above, so that no line is struck through.
        const bend = Math.min(60, 14 + Math.hypot(a[0] - b[0], a[1] - b[1]) / 6);
        const width = 1.2 + 4 * Math.sqrt(Math.abs(path.share));
        const isLit = place === state.lit;
        svg.append(drawn("path", {
          d: `M${a[0]} ${a[1]} C${a[0]} ${a[1] - bend} ${b[0]} ${b[1] - bend} ${b[0]} ${b[1]}`, "stroke-width": width.toFixed(2), class: isLit ? "" : "faint",
        }));
        if (isLit) svg.append(drawn("circle", { cx: b[0], cy: b[1], r: width / 2 + 2 }));
      }
    }
  }

  /** Scroll a text's box, and not the page, to one of its groups that is out of sight. */
  function reveal(group) {
    if (!group) return;
    const box = boxes[group.side];
    const offset = group.element.getBoundingClientRect().top - box.getBoundingClientRect().top;
    if (offset < 0 || offset > box.clientHeight - 30) box.scrollTop += offset - box.clientHeight / 2;
  }

  /** Bring what is selected and its heaviest source into sight. */
  function revealAnswer() {
    reveal(shown.find((group) => group.selected));
    reveal(shown.find((group) => group.side === 0 && group.rank === 0));
    drawArcs();
  }

  // --- the map ------------------------------------------------------------------------

  /** Sentences, or the units where these are not smaller. */
  const mapLevel = told.levels.findIndex((level) => level.name === "sentences");
  const mapGroups = [0, 1].flatMap((side) => {
    const { groups } = told.levels[Math.max(mapLevel, 0)];
    const apart = [...Array(N).keys()].filter((unit) => sideOf(unit) === side && told.starts[unit] < 0)
      .map((unit) => ({ units: [unit], side, text: textOf(unit) }));
    const placed = groupedCells(side, groups).map((cell) => ({ ...cell, text: told.texts[side].slice(cell.start, cell.stop) }));
    return [...apart, ...placed];
  });
  const mapRowOf = new Int32Array(N);
  mapGroups.forEach((group, row) => { for (const unit of group.units) mapRowOf[unit] = row; });

  /** The mass that flows between sentences, heaviest first. */
  function flows() {
    const arcs = new Map(); // two sentences -> the place of their sums
    const sums = { net: [], all: [] };
    eachFlow(answer, (later, earlier, net, all) => {
      const [from, to] = [mapRowOf[later], mapRowOf[earlier]];
      if (from === to) return;
      const key = from * mapGroups.length + to;
      let place = arcs.get(key);
      if (place === undefined) {
        place = arcs.size;
        arcs.set(key, place);
        sums.net.push(0);
        sums.all.push(0);
      }
      sums.net[place] += net;
      sums.all[place] += all;
    });
    const masses = signed(sums);
    return [...arcs].map(([key, place]) => ({
      from: Math.floor(key / mapGroups.length), to: key % mapGroups.length, mass: masses[place] / answer.total,
    }));
  }

  let mapArcs = [];

  function writeMap() {
    const box = byId("map");
    const focused = box.contains(document.activeElement) ? document.activeElement.dataset.row : undefined;
    const masses = signed(arrivedIn(answer, mapRowOf, mapGroups.length));
    const chosen = new Set(state.steps);
    mapArcs = holding(flows(), state.keep).slice(0, MOST_ARCS);
    const used = new Set(mapArcs.flatMap((arc) => [arc.from, arc.to]));
    const isLong = mapGroups.length > LONG_MAP;
    const svg = drawn("svg", { "aria-hidden": "true" });
    const made = [svg];
    let skipped = [];
    let side = -1;
    const closeGap = () => {
      if (skipped.length > 1) made.push(element("p", "gap", `⋯ ${skipped.length} without much mass`));
      else skipped.forEach(addRow);
      skipped = [];
    };
    function addRow(number) {
      const group = mapGroups[number];
      const steps = group.units.filter((unit) => stepOf[unit] >= 0);
      const count = steps.filter((unit) => chosen.has(stepOf[unit])).length;
      const selected = count > 0;
      const row = element(steps.length ? "button" : "div", "row");
      if (steps.length) row.type = "button";
      row.dataset.row = number;
      const mass = masses[number] / answer.total;
      row.classList.toggle("selected", selected && count === steps.length);
      row.classList.toggle("partly", selected && count < steps.length);
      row.classList.toggle("none", !selected && !used.has(number));
      const text = element("span", "t");
      text.dir = "auto";
      appendText(text, oneLine(group.text) || JSON.stringify(group.text));
      row.append(element("span", "n", String(number + 1)), text, element("span", "m", selected ? (count < steps.length ? "◐" : "●") : percent(mass)));
      made.push(row);
      group.row = row;
    }
    mapGroups.forEach((group, number) => {
      group.row = null;
      if (group.side !== side) {
        closeGap();
        side = group.side;
        made.push(element("p", "side", byId(side ? "generated-title" : "source-title").textContent));
      }
      const selected = group.units.some((unit) => chosen.has(stepOf[unit]));
      if (isLong && !selected && !used.has(number)) {
        skipped.push(number);
        return;
      }
      closeGap();
      addRow(number);
    });
    closeGap();
    box.replaceChildren(...made);
    if (focused !== undefined) box.querySelector(`[data-row="${focused}"]`)?.focus();
    const what = mapLevel > 0 ? "sentences" : told.levels[0].name;
    byId("map-note").textContent = `The same selection between ${what}. An arc runs from a generated one up to what it draws on, as thick as the mass that takes it; `
      + `the lightest arcs, beyond ${percent(state.keep)} of that mass, are left out. Numbers: mass that ends there (prompt) or passes through (generated). Click one to ask about it.`;
  }

  function drawMapArcs() {
    const svg = byId("map").querySelector("svg");
    if (!svg) return;
    svg.replaceChildren();
    const right = svg.getBoundingClientRect().width;
    const middle = (row) => row.offsetTop + row.offsetHeight / 2;
    const largest = Math.max(...mapArcs.map((arc) => Math.abs(arc.mass)), 1e-300);
    const height = Math.max(byId("map").offsetHeight, 1);
    for (const arc of [...mapArcs].reverse()) {
      const [a, b] = [mapGroups[arc.from].row, mapGroups[arc.to].row];
      if (!a || !b) continue;
      const [y1, y2] = [middle(a), middle(b)];
      const size = Math.abs(arc.mass) / largest;
      // The control points of a cubic curve stand a third beyond its bulge.
      const bulge = (right - 8) * 1.3 * Math.max(0.12, Math.sqrt(Math.abs(y1 - y2) / height));
      const path = drawn("path", {
        d: `M${right} ${y1} C${right - bulge} ${y1} ${right - bulge} ${y2} ${right} ${y2}`,
        "stroke-width": (0.8 + 5.2 * size).toFixed(2), opacity: (0.25 + 0.65 * Math.sqrt(size)).toFixed(2),
        "data-from": arc.from, "data-to": arc.to,
      });
      if (arc.mass < 0 || state.sign === "negative") path.classList.add("minus");
      svg.append(path);
    }
  }

  function lightMap(row) {
    for (const path of byId("map").querySelectorAll("svg path")) {
      path.classList.toggle("dim", row !== null && path.dataset.from !== row && path.dataset.to !== row);
    }
  }

  // --- all of it ----------------------------------------------------------------------

  /** Numbers above the texts and arcs go where the layout has put things. */
  function measure() {
    writeLabels();
    drawMapArcs();
    drawArcs();
  }

  function update() {
    answer = solve(state.steps, state.hops);
    direct = state.hops === 0 ? answer : solve(state.steps, 0);
    found = bestPaths(state.steps, state.paths);
    state.pinned = -1;
    shade();
    tell();
    listPaths();
    writeMap();
    light(-1);
    // What needs the places of things comes last, so that they are found once.
    measure();
    byId("back").disabled = state.steps.join() === asked.join();
  }

  let anchorGroup = null; // where a drag or an extension began
  let dragging = false;
  let touched = null; // a group and where a finger is on it, which may be about to scroll

  /** What is selected changes at most once per frame: drags bring many events. */
  let waiting = false;
  function updateSoon() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      update();
      if (!dragging) revealAnswer();
    });
  }

  function select(steps) {
    const sorted = [...new Set(steps)].sort((a, b) => a - b);
    if (!sorted.length || sorted.join() === state.steps.join()) return;
    state.steps = sorted;
    state.paths = PATHS;
    updateSoon();
  }

  /** All steps of the groups between two, in either order. */
  function stepsBetween(a, b) {
    const [low, high] = a.place < b.place ? [a, b] : [b, a];
    return shown.slice(low.place, high.place + 1).flatMap((group) => group.steps);
  }

  function csv() {
    const all = solve(state.steps, null);
    const now = signed(answer.arrived);
    const head = ["unit", "kind", "selected", "direct", "all_paths", "shown"];
    if (told.signed) head.push("for", "against");
    const lines = [[...head, "text_json"].join(",")];
    const chosen = new Set(state.steps);
    for (let unit = 0; unit < N; unit++) {
      const cellsOfLine = [
        unit, stepOf[unit] < 0 ? "source" : "generated", chosen.has(stepOf[unit]) ? 1 : 0,
        direct.arrived.net[unit], all.arrived.net[unit], now[unit],
      ];
      if (told.signed) {
        const [net, whole] = [answer.arrived.net[unit], answer.arrived.all[unit]];
        cellsOfLine.push(Math.max((whole + net) / 2, 0), Math.max((whole - net) / 2, 0));
      }
      // As JSON, so that no spreadsheet takes a text such as =1+1 for a formula.
      cellsOfLine.push(`"${JSON.stringify(textOf(unit)).replace(/"/g, '""')}"`);
      lines.push(cellsOfLine.join(","));
    }
    return `${lines.join("\r\n")}\r\n`;
  }

  async function copy() {
    const text = csv();
    // A notebook's frame has no clipboard, and to ask for it would be a violation.
    const isFramed = location.href === "about:srcdoc";
    try {
      if (isFramed) throw new Error("no clipboard");
      await navigator.clipboard.writeText(text);
      byId("done").textContent = `Copied ${N} lines.`;
    } catch {
      byId("csv").value = text;
      byId("numbers").showModal();
      byId("csv").select();
    }
  }

  function readOut(group) {
    const box = byId("readout");
    if (!group) {
      box.textContent = "\u00a0";
      return;
    }
    const kind = group.steps.length ? "passes through" : "ends here";
    const name = group.units.length === 1 ? `unit ${group.units[0]}` : `units ${group.units[0]}–${group.units[group.units.length - 1]}`;
    const text = oneLine(plain(group.text));
    box.textContent = `\u2068${text.length > 60 ? `${text.slice(0, 59)}…` : text}\u2069 (${name}): `
      + `${percent(group.mass)} ${kind}${state.hops === 0 ? "" : `; direct ${percent(group.direct)}`}`
      + `${group.selected ? "; selected" : ""}.`;
  }

  // --- what the reader does -----------------------------------------------------------

  const groupAt = (target) => {
    const made = target instanceof Element ? target.closest(".u[data-place]") : null;
    return made ? shown[Number(made.dataset.place)] : null;
  };
  const isGenerated = (group) => Boolean(group && group.steps.length);

  function moveFocus(group) {
    for (const other of shown) if (other.side === group.side) other.element.tabIndex = other === group ? 0 : -1;
    group.element.focus();
  }

  boxes[1].addEventListener("pointerdown", (event) => {
    const group = groupAt(event.target);
    if (event.button !== 0 || !isGenerated(group)) return;
    event.preventDefault();
    // A finger's pointer is bound to the first element unless it is let go.
    if (event.target.hasPointerCapture?.(event.pointerId)) event.target.releasePointerCapture(event.pointerId);
    if (!(event.shiftKey && anchorGroup)) anchorGroup = group;
    dragging = true;
    if (event.pointerType === "touch") {
      touched = { group, x: event.clientX, y: event.clientY };
      return;
    }
    moveFocus(group);
    select(stepsBetween(anchorGroup, group));
  });
  boxes[1].addEventListener("pointermove", (event) => {
    if (!dragging) return;
    const group = groupAt(document.elementFromPoint(event.clientX, event.clientY));
    if (!isGenerated(group) || group === touched?.group) return;
    if (touched && Math.abs(event.clientX - touched.x) <= Math.abs(event.clientY - touched.y)) return;
    touched = null;
    select(stepsBetween(anchorGroup, group));
  });
  for (const name of ["pointerup", "pointercancel"]) {
    document.addEventListener(name, () => {
      // A finger that is taken off again has chosen; one that scrolls has not.
      if (touched && name === "pointerup") select(touched.group.steps);
      if (dragging && !touched) revealAnswer();
      [dragging, touched] = [false, null];
    });
  }

  const sentenceOf = (group) => mapRowOf[group.units[0]];

  /** The next group of the same text, or the first one of the next sentence. */
  function neighbour(group, way, bySentence) {
    let best = null;
    for (let place = group.place + way; place >= 0 && place < shown.length; place += way) {
      const other = shown[place];
      if (other.side !== group.side) break;
      if (!bySentence) return other;
      if (best && sentenceOf(other) !== sentenceOf(best)) break;
      if (sentenceOf(other) !== sentenceOf(group)) {
        best = other;
        if (way > 0) break;
      }
    }
    return best;
  }

  byId("texts").addEventListener("keydown", (event) => {
    const group = groupAt(event.target);
    if (!group) return;
    const way = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (way) {
      event.preventDefault();
      const next = neighbour(group, way, event.key === "ArrowDown" || event.key === "ArrowUp");
      if (!next) return;
      if (event.shiftKey && group.side) {
        anchorGroup ??= group;
        select(stepsBetween(anchorGroup, next));
      } else anchorGroup = null;
      moveFocus(next);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      anchorGroup = group;
      select(group.steps);
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !byId("numbers").open) {
      anchorGroup = null;
      select(asked);
    }
  });

  for (const box of boxes) {
    box.addEventListener("pointerover", (event) => readOut(groupAt(event.target)));
    box.addEventListener("focusin", (event) => readOut(groupAt(event.target)));
    box.addEventListener("pointerleave", () => readOut(null));
    box.addEventListener("scroll", drawArcs, { passive: true });
  }

  const pathOf = (event) => {
    const button = event.target instanceof Element ? event.target.closest(".path") : null;
    return button ? Number(button.dataset.path) : -1;
  };
  byId("paths").addEventListener("pointerover", (event) => relight(pathOf(event)));
  byId("paths").addEventListener("pointerleave", () => relight(state.pinned));
  byId("paths").addEventListener("focusin", (event) => relight(pathOf(event)));
  byId("paths").addEventListener("focusout", () => relight(state.pinned));
  byId("paths").addEventListener("click", (event) => {
    const place = pathOf(event);
    if (place < 0) return;
    state.pinned = state.pinned === place ? -1 : place;
    for (const unit of found[place].units) reveal(shown[placeOf[unit]]);
    relight(place);
  });
  byId("more").addEventListener("click", () => {
    const before = found.length;
    state.paths *= 2;
    found = bestPaths(state.steps, state.paths);
    listPaths();
    relight(state.pinned);
    byId("paths").querySelector(`[data-path="${before}"]`)?.focus();
  });
  byId("arcs-on").addEventListener("change", drawArcs);

  const rowOf = (event) => (event.target instanceof Element ? event.target.closest(".row") : null);
  byId("map").addEventListener("pointerover", (event) => lightMap(rowOf(event)?.dataset.row ?? null));
  byId("map").addEventListener("pointerleave", () => lightMap(null));
  byId("map").addEventListener("focusin", (event) => lightMap(rowOf(event)?.dataset.row ?? null));
  byId("map").addEventListener("focusout", () => lightMap(null));
  byId("map").addEventListener("click", (event) => {
    const row = rowOf(event);
    if (!row) return;
    const units = mapGroups[Number(row.dataset.row)].units.filter((unit) => stepOf[unit] >= 0);
    if (units.length) select(units.map((unit) => stepOf[unit]));
  });

  const controls = byId("controls");
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("input", (event) => {
    const { name, id, value } = event.target;
    const limit = () => Math.max(0, Math.floor(Number(byId("hops").value)) || 0);
    if (name === "follow") state.hops = { direct: 0, all: null }[value] ?? (value === "hops" ? limit() : null);
    else if (id === "hops") {
      controls.elements.follow.value = "hops";
      state.hops = limit();
    } else if (name === "sign") state.sign = value;
    else if (name === "level") {
      state.level = Number(value);
      anchorGroup = null;
      writeTexts();
    } else if (id === "keep") {
      state.keep = Number(value) / 100;
      byId("kept").value = `${value}%`;
    }
    updateSoon();
  });
  byId("back").addEventListener("click", () => select(asked));
  byId("copy").addEventListener("click", copy);

  new ResizeObserver(measure).observe(byId("texts"));

  // What a notebook or a test may ask; nothing here depends on it.
  window.captumCage = Object.freeze({
    /** Numbers of some steps: by source (P), by generated unit (G), and totals. */
    explain(steps = state.steps, hops = state.hops) {
      const solved = solve([...steps], hops);
      const bySource = (values) => [...values].filter((_, unit) => stepOf[unit] < 0);
      const byStep = (values) => Array.from(unitOf, (unit) => values[unit]);
      return {
        seq_attr: bySource(solved.mass), positive_attr: bySource(solved.positive), negative_attr: bySource(solved.negative),
        step_attr: byStep(solved.mass), step_positive: byStep(solved.positive), step_negative: byStep(solved.negative),
        leaked: solved.leaked, unresolved: solved.unresolved,
      };
    },
    paths: (k = PATHS, steps = state.steps) => bestPaths([...steps], k),
    selected: () => [...state.steps],
    /** What is shown as one, and its share. */
    groups: () => shown.map(({ units, mass }) => ({ units: [...units], mass })),
    csv,
    /** Milliseconds that it takes to select some steps and lay the page out again. */
    timed(steps) {
      const begin = performance.now();
      state.steps = [...steps];
      update();
      document.body.getBoundingClientRect();
      return performance.now() - begin;
    },
  });

  if (state.hops !== null && state.hops > 0) byId("hops").value = state.hops;
  controls.elements.follow.value = state.hops === null ? "all" : state.hops === 0 ? "direct" : "hops";
  // Where the texts stand one below the other, arcs between them cross too many lines.
  byId("arcs-on").checked = window.matchMedia("(min-width: 60rem)").matches;
  writeTexts();
  update();
  revealAnswer();
})();
