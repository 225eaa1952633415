"use strict";
// Shows what state.json says of the node, once a second while the page can be seen. Names come from images and stores: they are
// only ever put in as text. The one piece of HTML, a start's waterfall, is made and escaped by the server.

const EVERY = 1000; // milliseconds
const byId = (id) => document.getElementById(id);
const rows = new Map(); // by tree: the row, and what its map showed last
let state = null;

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function size(bytes) {
  if (bytes === null || bytes === undefined) return "not known";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
  return `${unit && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[unit]}`;
}

const seconds = (value) => (value === null || value === undefined ? "not known" : `${value.toFixed(3)} s`);

function percent(here, whole) {
  if (here === null || whole === null) return "";
  return here >= whole ? "100 %" : `${Math.min(99, Math.floor((100 * here) / whole))} %`; // all but some is not all
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text; // a screen reader hears of changes alone
}

function showNow() {
  const { rates, cache, packfs } = state;
  const values = [];
  if (rates.seconds) {
    values.push(["reads", `${rates.reads.requests.toFixed(0)}/s, ${size(rates.reads.bytes)}/s`]);
    for (const [source, label] of [["cache", "from the cache"], ["prefetched", "from memory"], ["store", "from the store"], ["readahead", "read ahead"]]) {
      values.push([label, `${size(rates.sources[source].bytes)}/s`]);
    }
    values.push(["hits", rates.hit_ratio === null ? "no reads" : `${Math.round(100 * rates.hit_ratio)} %`]);
  }
  if (packfs.running) {
    values.push(["in flight", `${packfs.inflight}`], ["queued", `${cache.queued || 0}`]);
    values.push(["cache", size(cache.held_bytes) + (cache.limit_bytes ? ` of ${size(cache.limit_bytes)}` : "")]);
  }
  const list = byId("now");
  while (list.children.length > values.length) list.lastChild.remove();
  values.forEach(([name, value], position) => {
    let pair = list.children[position];
    if (!pair) {
      pair = element("div");
      pair.append(element("dt"), element("dd"));
      list.append(pair);
    }
    setText(pair.firstChild, name);
    setText(pair.lastChild, value);
  });
}

function showProblems() {
  const looked = state.examined ? `floe doctor looked at ${new Date(1000 * state.examined).toLocaleTimeString()}` : "floe doctor is looking";
  setText(byId("examined"), looked);
  const list = byId("problems");
  const said = JSON.stringify(state.problems);
  if (list.dataset.said === said) return;
  list.dataset.said = said;
  list.replaceChildren(...state.problems.map((problem) => {
    const item = element("li");
    item.append(element("span", problem.level, problem.level), `: ${problem.text} `, element("code", problem.mend));
    return item;
  }));
  if (!state.problems.length) list.append(element("li", "none is known"));
}

function rowOf(mount) {
  const row = element("tr");
  const canvas = element("canvas");
  canvas.setAttribute("role", "img");
  const cells = ["", "", "number", ""].map((name) => element("td", undefined, name));
  const name = element("span");
  const more = element("small");
  cells[0].append(name, more);
  cells[2].append(element("span"), element("small"));
  cells[3].append(canvas);
  row.append(...cells);
  return { row, name, more, mode: cells[1], here: cells[2].children[0], bytes: cells[2].children[1], canvas, drawn: "" };
}

function draw(known, map, colours, place) {
  const { canvas } = known;
  const width = Math.max(1, Math.round(place.width * devicePixelRatio));
  const height = Math.max(1, Math.round(place.height * devicePixelRatio));
  const said = [width, height, colours.dark, map.here, map.touched, map.ahead, map.pinned].join();
  if (known.drawn === said) return;
  known.drawn = said;
  canvas.width = width;
  canvas.height = height;
  const to = canvas.getContext("2d");
  const count = map.here.length || 1;
  const band = Math.round(height * 0.15);
  for (let cell = 0; cell < count; cell += 1) {
    const left = Math.round((cell * width) / count);
    const wide = Math.max(1, Math.round(((cell + 1) * width) / count) - left - (width / count > 4 ? 1 : 0));
    const full = height - band;
    const rise = (level) => Math.round((full * Number(level || 0)) / 9);
    const part = (colour, from, to_) => {
      to.fillStyle = colour;
      to.fillRect(left, full - to_, wide, to_ - from);
    };
    const here = rise(map.here[cell]);
    const touched = Math.min(here, rise(map.touched[cell]));
    const ahead = Math.min(here - touched, rise(map.ahead[cell]));
    part(colours.absent, 0, full);
    part(colours.here, 0, here);
    part(colours.touched, 0, touched);
    part(colours.ahead, touched, touched + ahead);
    if (map.pinned[cell] === "1") {
      to.fillStyle = colours.pinned;
      to.fillRect(left, height - band + 1, wide, band - 1);
    }
  }
}

const share = (plane) => (plane.length ? Math.round([...plane].reduce((sum, level) => sum + Number(level), 0) / plane.length / 0.09) : 0);

function showMounts() {
  const wanted = byId("filter").value.trim().toLowerCase();
  const body = byId("trees").tBodies[0];
  const shown = state.mounts.filter((mount) => [mount.tree, mount.mode, ...mount.names].join(" ").toLowerCase().includes(wanted));
  const all = state.mounts.length;
  setText(byId("count"), all ? `${shown.length === all ? all : `${shown.length} of ${all}`} ${all === 1 ? "tree is" : "trees are"} mounted.` : "No trees are mounted.");
  const style = getComputedStyle(document.documentElement);
  const colours = Object.fromEntries(["touched", "ahead", "here", "absent", "pinned"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  colours.dark = colours.absent;
  const kept = new Set();
  shown.forEach((mount, position) => {
    let known = rows.get(mount.tree);
    if (!known) rows.set(mount.tree, (known = rowOf(mount)));
    kept.add(mount.tree);
    setText(known.name, mount.names[0] || `tree ${mount.tree.slice(0, 16)}`);
    const others = mount.names.length > 1 ? `and ${mount.names.slice(1).join(", ")}; ` : "";
    setText(known.more, `${others}${mount.kind}, tree ${mount.tree.slice(0, 12)}, shown in ${mount.uses === 1 ? "1 place" : `${mount.uses} places`}`);
    setText(known.mode, mount.mode);
    setText(known.here, percent(mount.here_bytes, mount.content_bytes));
    setText(known.bytes, mount.content_bytes === null ? "" : `${size(mount.here_bytes)} of ${size(mount.content_bytes)}`);
    const { map } = mount;
    const label = map.here
      ? `${share(map.here)} % of the frames are here, ${share(map.touched)} % were read, ${share(map.ahead)} % were fetched ahead and not read${map.pinned.includes("1") ? "; pinned" : ""}`
      : "no frames are known";
    if (known.canvas.getAttribute("aria-label") !== label) known.canvas.setAttribute("aria-label", label);
    if (body.children[position] !== known.row) body.insertBefore(known.row, body.children[position] || null);
  });
  for (const [tree, known] of rows) {
    if (!kept.has(tree)) {
      known.row.remove();
      rows.delete(tree);
    }
  }
  // What can be seen, or nearly, and after all is in its place: one layout for all.
  const seen = shown.map((mount) => [mount, rows.get(mount.tree).canvas.getBoundingClientRect()]);
  for (const [mount, place] of seen) {
    if (place.bottom > -innerHeight / 2 && place.top < 1.5 * innerHeight) draw(rows.get(mount.tree), mount.map, colours, place);
  }
}

async function waterfall(start, into) {
  const answer = await fetch(`start?${new URLSearchParams({ key: start.key, at: start.at })}`);
  const text = await answer.text();
  if (!answer.ok) {
    into.textContent = text;
    return;
  }
  into.replaceChildren(...new DOMParser().parseFromString(text, "text/html").body.childNodes);
}

function showStarts() {
  const place = byId("starts");
  const wanted = state.starts.map((start) => `${start.key}\n${start.at}`);
  for (const old of [...place.children]) if (!wanted.includes(old.dataset.of)) old.remove();
  if (!state.starts.length) {
    place.replaceChildren(element("p", "No start is known."));
    return;
  }
  state.starts.forEach((start, position) => {
    let details = [...place.children].find((one) => one.dataset.of === wanted[position]);
    if (!details) {
      details = element("details");
      details.dataset.of = wanted[position];
      const into = element("div");
      details.append(element("summary"), into);
      details.addEventListener("toggle", () => { if (details.open) waterfall(start, into); });
    }
    const when = new Date(start.at * 1000).toLocaleString();
    const told = start.last_read === null ? "under way, or its end is not known" : `first read after ${seconds(start.first_read)}, last new read after ${seconds(start.last_read)}`;
    setText(details.firstChild, `${when}: ${start.name || start.id}; ${told}`);
    if (place.children[position] !== details) place.insertBefore(details, place.children[position] || null);
  });
}

function showNamed() {
  const body = byId("named").tBodies[0];
  const said = JSON.stringify(state.named);
  if (body.dataset.said === said) return;
  body.dataset.said = said;
  body.replaceChildren(...state.named.map((one) => {
    const row = element("tr");
    const name = element("td", one.name);
    name.append(element("small", one.kind));
    row.append(
      name,
      element("td", `${one.trees}`),
      element("td", `${size(one.here_bytes)} of ${size(one.content_bytes)}`, "number"),
      element("td", one.shared_bytes === 0 ? "nothing" : size(one.shared_bytes), "number"),
      element("td", one.shares_with.join(", ")),
    );
    return row;
  }));
}

function show() {
  document.title = `Floe on ${state.host}`;
  setText(byId("host"), `${state.version} on ${state.host}`);
  setText(byId("daemons"), `pack filesystem ${state.packfs.state}, snapshotter ${state.snapshotter.state}`);
  showNow();
  showProblems();
  showMounts();
  showStarts();
  showNamed();
}

async function look() {
  if (!document.hidden) {
    try {
      const answer = await fetch("state.json", { cache: "no-store" });
      if (!answer.ok) throw new Error(`it answered ${answer.status}`);
      state = await answer.json();
      show();
      document.body.dataset.samples = Number(document.body.dataset.samples || 0) + 1;
    } catch (error) {
      setText(byId("daemons"), `floe ui does not answer: ${error.message}`);
    }
  }
  setTimeout(look, EVERY);
}

byId("filter").addEventListener("input", () => state && showMounts());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => state && showMounts());
addEventListener("resize", () => state && showMounts());
let drawing = false;
addEventListener("scroll", () => {
  if (drawing || !state) return;
  drawing = true;
  requestAnimationFrame(() => { drawing = false; showMounts(); });
}, { passive: true });
look();
