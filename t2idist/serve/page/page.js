"use strict";

const byId = (id) => document.getElementById(id);
const STEPS = 9;                 // of the way to another sentence
const SHOW_CLOCK_AFTER = 600;    // milliseconds
const LOOK_AGAIN_EVERY = 2000;
const MAX_CHANGES = 12;
const MAX_SHOWN_WORDS = 300;

const state = {
  card: null, token: null, vocabulary: [],
  frames: [], index: 0,          // what the slider chooses from; a frame: {label, images, words, changed}
  stage: 0, pinned: null, pointed: null,
  asked: null, first: null,      // the last sentence that was drawn: the request, and its frame
  work: null, lookingForServer: false,
};

// ------------------------------------------------------------ the server
class Refusal extends Error {}
class NoServer extends Error {}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (state.token) headers.Authorization = `Bearer ${state.token}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new NoServer("The server does not answer. Your words are kept; this page looks for it every two seconds.");
  }
  if (answer.status === 401) {
    await askForToken(state.token !== null);
    return ask(path, options);
  }
  const body = await answer.text().catch(() => { throw new NoServer("The server went away while it answered."); });
  let content;
  try { content = JSON.parse(body); } catch { content = null; }
  if (answer.ok && content !== null) return content;
  const sentence = content?.error ?? (answer.status === 503
    ? "The server has too much to do. Try again in a few seconds."
    : `The server could not answer (status ${answer.status}). Try again.`);
  throw new Refusal(sentenceOf(sentence));
}

function askForToken(wrong) {
  const dialog = byId("token-dialog");
  byId("token-error").hidden = !wrong;
  byId("token-error").textContent = "This is not the token of this server.";
  byId("token").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    byId("token-form").onsubmit = (event) => {
      event.preventDefault();
      if (!byId("token").value.trim()) return;
      state.token = byId("token").value.trim();
      byId("token").value = "";
      dialog.close();
      resolve();
    };
    dialog.oncancel = (event) => event.preventDefault();
  });
}

async function lookForServer() {
  if (state.lookingForServer) return;
  state.lookingForServer = true;
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, LOOK_AGAIN_EVERY));
    try { if ((await fetch("/healthz")).ok) break; } catch { /* not yet */ }
  }
  state.lookingForServer = false;
  showError("");
  showNote("The server is back.");
  if (!state.card) start();
}

// ------------------------------------------------------------ messages
function showError(sentence) {
  byId("error").textContent = sentence;
  byId("error").hidden = !sentence;
}
function showNote(sentence) {
  byId("note").textContent = sentence;
  byId("note").hidden = !sentence;
}
/** Show what is left out of a sentence; the server's messages begin with the sentence, which stands above. */
function noteWarnings(warnings) {
  showNote(warnings.map((warning) => sentenceOf(warning.replace(/^".*": (is )?/s, (_, is) => (is ? "The sentence is " : "")))).join(" "));
}
const sentenceOf = (text) => text.charAt(0).toUpperCase() + text.slice(1).replace(/\.?$/, ".");
const say = (sentence) => { byId("said").textContent = sentence; };

function fail(error) {
  if (error.name === "AbortError") { say("Stopped."); return; }
  if (!(error instanceof Refusal || error instanceof NoServer)) throw error;
  showError(error.message);
  if (error instanceof NoServer) lookForServer();
}

/** Run one piece of work at a time, with a clock and a button that stops it; a newer one stops the one before. */
async function work(what, run) {
  state.work?.abort();
  const mine = state.work = new AbortController();
  const began = performance.now();
  byId("clock").textContent = what;
  const shown = setTimeout(() => { byId("status-row").hidden = false; say(what); }, SHOW_CLOCK_AFTER);
  const clock = setInterval(() => {
    byId("clock").textContent = `${what} ${Math.round((performance.now() - began) / 1000)} s`;
  }, 1000);
  byId("pictures").classList.add("stale");
  document.body.setAttribute("aria-busy", "true");
  showError("");
  showNote("");
  for (const id of ["text", "change-to", "way-to"]) byId(id).removeAttribute("aria-invalid");
  try {
    return await run(mine.signal);
  } catch (error) {
    if (state.work === mine) fail(error);
    return null;
  } finally {
    clearTimeout(shown);
    clearInterval(clock);
    if (state.work === mine) {
      state.work = null;
      byId("status-row").hidden = true;
      byId("pictures").classList.remove("stale");
      document.body.removeAttribute("aria-busy");
    }
  }
}

// ------------------------------------------------------------ draw
function whole(id, fallback) {
  const value = byId(id).value.trim();
  return value === "" ? fallback : Number(value);
}

function request() {
  const truncation = byId("truncation").value.trim();
  return {
    ...(state.card.kind === "text" ? { text: byId("text").value.trim() } : {}),
    n: whole("count", 4), seed: whole("seed", 0), scale: "all", attention: state.card.attention,
    ...(truncation === "" ? {} : { truncation: Number(truncation) }),
  };
}

const post = (body, signal) => ask("/draw", {
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
});

async function draw() {
  if (state.card.kind === "text" && !byId("text").value.trim()) {
    showError("Type a sentence first.");
    byId("text").setAttribute("aria-invalid", "true");
    byId("text").focus();
    return;
  }
  const body = request();
  const answer = await work("Drawing …", (signal) => post(body, signal));
  if (!answer) return;
  state.asked = body;
  state.pinned = null;
  state.first = { label: body.text ?? "", ...answer };
  showFrames([state.first], "");
  fillTools(answer.words);
  noteWarnings(answer.warnings);
  say(`${answer.images.length} pictures drawn.`);
}

async function changeWord() {
  const from = Number(byId("change-from").value), words = state.first.words;
  const others = [...new Set(byId("change-to").value.split(",").map((word) => word.trim()).filter(Boolean))];
  if (!others.length || others.length > MAX_CHANGES) {
    showError(others.length ? `Give at most ${MAX_CHANGES} words.` : "Give the words that replace it, with commas between them.");
    byId("change-to").setAttribute("aria-invalid", "true");
    byId("change-to").focus();
    return;
  }
  const { asked, first } = state;
  const frames = await work("Drawing …", (signal) => Promise.all(others.map(async (other) => {
    const text = words.map((word, i) => (i === from ? other : word)).join(" ");
    const answer = await post({ ...asked, text }, signal);
    if (answer.warnings.length) throw new Refusal(`The model does not know “${other}”.`);
    return { label: text, changed: [from, other.split(/\s+/).length], ...answer };
  })));
  if (!frames) return;
  state.pinned = null;
  showFrames([{ ...first, changed: [from, 1] }, ...frames], `Instead of “${words[from]}”`);
  byId("slider").value = "1";
  slide();
  byId("slider").focus();
}

async function goAnotherWay() {
  const to = byId("way-to").value.trim();
  if (!to) {
    showError("Type the sentence to go to.");
    byId("way-to").setAttribute("aria-invalid", "true");
    byId("way-to").focus();
    return;
  }
  const { attention, ...asked } = state.asked;
  const n = Math.max(1, Math.min(asked.n, Math.floor(state.card.limits.images / STEPS)));
  const answer = await work("Drawing the way …", (signal) => post({ ...asked, n, to, steps: STEPS }, signal));
  if (!answer) return;
  const frames = [];
  for (let i = 0; i < answer.images.length; i += n) {
    frames.push({ label: answer.images[i].label, images: answer.images.slice(i, i + n), words: [] });
  }
  showFrames(frames, "On the way");
  noteWarnings(answer.warnings);
  byId("slider").focus();
}

// ------------------------------------------------------------ frames: the pictures, and the slider over them
function showFrames(frames, name) {
  state.frames = frames;
  state.index = 0;
  const slider = byId("slider");
  slider.max = String(frames.length - 1);
  slider.value = "0";
  byId("slider-label").textContent = name;
  byId("scrub").hidden = frames.length < 2;
  byId("result").hidden = false;
  slide();
}

function slide() {
  state.index = Number(byId("slider").value);
  const frame = state.frames[state.index];
  byId("slider-value").textContent = frame.label;
  byId("slider").setAttribute("aria-valuetext", frame.label);
  showPictures(frame);
  showWords(frame);
}

function pngUrl(base64) { return `data:image/png;base64,${base64}`; }

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function showPictures(frame) {
  const place = byId("pictures");
  place.classList.remove("pair");
  place.replaceChildren(...frame.images.map((picture, i) => {
    const last = picture.sizes.length - 1, size = picture.sizes[last];
    const img = element("img", { src: pngUrl(picture.pngs[last]), alt: `Picture ${i + 1}: ${frame.label || "without words"}` });
    const figure = element("figure", {}, element("div", { className: "stack" }, img, element("canvas")));
    if (last) {
      figure.append(element("div", { className: "scales" }, ...picture.sizes.slice(0, last).map((each, s) =>
        element("span", {}, element("img", { src: pngUrl(picture.pngs[s]), width: each, height: each, alt: `At ${each} pixels` }), `${each} px`))));
    }
    const link = element("a", { href: img.src, download: `${i + 1}.png`, textContent: "PNG" });
    link.setAttribute("aria-label", `Save picture ${i + 1} as PNG`);
    figure.append(element("figcaption", {}, element("span", { textContent: `${i + 1} · ${size} px` }), link));
    return figure;
  }));
}

function showWords(frame) {
  const words = frame.words ?? [], attention = frame.images[0]?.attention.length > 0;
  byId("words-row").hidden = !words.length;
  byId("words-hint").textContent = attention
    ? "Point at a word to see where the pictures attend to it. Choose one to change it."
    : "Choose a word to change it.";
  byId("words").replaceChildren(...words.map((word, i) => {
    const chip = element("button", { type: "button", className: "chip", textContent: word });
    const [from, length] = frame.changed ?? [-1, 0];
    if (i >= from && i < from + length) chip.classList.add("changed");
    chip.setAttribute("aria-pressed", String(state.pinned === i));
    chip.onmouseenter = chip.onfocus = () => { state.pointed = i; overlay(); };
    chip.onmouseleave = chip.onblur = () => { state.pointed = null; overlay(); };
    chip.onclick = () => choose(i);
    return chip;
  }));
  showStages(attention ? frame.images[0].attention[0]?.length ?? 0 : 0);
  overlay();
}

function choose(i) {
  state.pinned = state.pinned === i ? null : i;
  for (const [j, chip] of [...byId("words").children].entries()) chip.setAttribute("aria-pressed", String(state.pinned === j));
  if (i < byId("change-from").options.length) byId("change-from").value = String(i);
  overlay();
}

function showStages(count) {
  byId("stages").hidden = count < 2;
  state.stage = Math.min(state.stage, Math.max(0, count - 1));
  const shown = byId("stages").querySelectorAll("label");
  if (shown.length === count) return;
  state.stage = Math.max(0, count - 1);
  shown.forEach((label) => label.remove());
  for (let stage = 0; stage < count; stage++) {
    const radio = element("input", { type: "radio", name: "stage", checked: stage === state.stage });
    radio.onchange = () => { state.stage = stage; overlay(); };
    byId("stages").append(element("label", {}, radio, `stage ${stage + 1}`));
  }
}

/** Dim each picture where it does not attend to the word, and warm it where it does. */
async function overlay() {
  const word = state.pointed ?? state.pinned, frame = state.frames[state.index];
  const canvases = byId("pictures").querySelectorAll("canvas");
  const peaks = [];
  for (const [i, canvas] of [...canvases].entries()) {
    const map = word === null ? null : frame.images[i]?.attention[word]?.[state.stage];
    canvas.classList.toggle("shown", Boolean(map));
    if (!map) continue;
    peaks.push(map.peak);
    paint(canvas, map);
  }
  if (peaks.length) say(`Attention to “${frame.words[word]}”, at most ${Math.max(...peaks).toFixed(2)}.`);
  for (const [i, caption] of [...byId("pictures").querySelectorAll("figcaption > span")].entries()) {
    const size = frame.images[i].sizes.at(-1);
    caption.textContent = peaks.length ? `${i + 1} · peak ${peaks[i].toFixed(2)}` : `${i + 1} · ${size} px`;
  }
}

async function paint(canvas, map) {
  const wanted = canvas.wanted = map;
  const image = new Image();
  image.src = pngUrl(map.png);
  await image.decode();
  if (canvas.wanted !== wanted) return;
  canvas.width = image.width;
  canvas.height = image.height;
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(image, 0, 0);
  const pixels = pen.getImageData(0, 0, image.width, image.height), data = pixels.data;
  for (let i = 0; i < data.length; i += 4) {
    const strength = data[i] / 255;
    const dark = strength < 0.55;
    data.set(dark ? [16, 18, 34, 215 * (1 - strength / 0.55)] : [255, 186, 60, 70 * (strength - 0.55) / 0.45], i);
  }
  pen.putImageData(pixels, 0, 0);
}

function fillTools(words) {
  byId("tools").hidden = !words.length;
  byId("change-from").replaceChildren(...words.map((word, i) => element("option", { value: String(i), textContent: word })));
}

// ------------------------------------------------------------ translate
const changes = new Map();       // attribute -> true (set) or false (cleared)
let upload = null;

function fillSwitches(domain) {
  const { attributes, conflicts, domains, kind } = state.card;
  changes.clear();
  byId("switches").hidden = false;
  if (kind === "domains") {
    byId("switches-title").textContent = "Translate to";
    byId("switch-list").replaceChildren(...domains.map((name) => {
      const chip = element("button", { type: "button", className: "chip", textContent: name.replaceAll("_", " ") });
      chip.setAttribute("aria-pressed", String(domains.length === 1));
      chip.onclick = () => {
        for (const other of byId("switch-list").children) other.setAttribute("aria-pressed", String(other === chip));
        changes.clear();
        changes.set(name, true);
        translate();
      };
      return chip;
    }));
    if (domains.length === 1) changes.set(domains[0], true);
    return;
  }
  byId("switches-title").textContent = "Attributes: press once to set, twice to clear, three times to leave as they are";
  const chips = new Map();
  const show = () => chips.forEach((chip, name) => chip.setAttribute("aria-checked", changes.has(name) ? String(changes.get(name)) : "mixed"));
  for (const name of attributes[domain]) {
    const chip = element("button", { type: "button", className: "chip", textContent: name.replaceAll("_", " ") });
    chip.setAttribute("role", "checkbox");
    chip.onclick = () => {
      if (!changes.has(name)) {
        changes.set(name, true);
        for (const other of conflicts[domain][name]) if (changes.get(other)) changes.delete(other);
      } else if (changes.get(name)) changes.set(name, false);
      else changes.delete(name);
      show();
      translate();
    };
    chips.set(name, chip);
  }
  byId("switch-list").replaceChildren(...chips.values());
  show();
}

async function translate() {
  if (!upload || !changes.size) return;
  const query = new URLSearchParams();
  if (state.card.kind === "domains") query.set("to", [...changes.keys()][0]);
  else {
    for (const [name, value] of changes) query.append(value ? "set" : "clear", name);
    query.set("domain", byId("domain").value || "0");
  }
  const type = upload.type.startsWith("image/") ? upload.type : "application/octet-stream";
  const answer = await work("Translating …", (signal) =>
    ask(`/translate?${query}`, { method: "POST", headers: { "Content-Type": type }, body: upload, signal }));
  if (!answer) return;
  byId("result").hidden = false;
  byId("pictures").classList.add("pair");
  byId("pictures").replaceChildren(...[["as the model sees it", answer.given], [answer.title.replaceAll("_", " "), answer.png]].map(([title, png]) => {
    const img = element("img", { src: pngUrl(png), alt: title });
    const link = element("a", { href: img.src, download: "translated.png", textContent: "PNG" });
    return element("figure", {}, element("div", { className: "stack" }, img), element("figcaption", {}, element("span", { textContent: title }), link));
  }));
  say(`Translated: ${answer.title}.`);
}

function take(file) {
  if (!file) return;
  const most = state.card.limits.upload_bytes;
  if (file.size > most) { showError(`${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MB; at most ${most >> 20} MB are read.`); return; }
  upload = file;
  showError("");
  byId("file-hint").textContent = changes.size ? file.name : `${file.name}: now choose what changes`;
  translate();
}

// ------------------------------------------------------------ start
function describe(card) {
  const sizes = card.sizes.map((size) => `${size}`).join(", ");
  const known = card.kind !== "text" ? "" : card.words ? ` · ${card.words.toLocaleString("en")} words` : " · any words";
  byId("about").textContent = `${card.name} · ${sizes} px${known} · after ${card.images_seen.toLocaleString("en")} images`;
  const titles = { text: "Draw from words", unconditional: "Draw", attributes: "Change a picture", domains: "Translate a picture" };
  document.title = byId("title").textContent = titles[card.kind];
  byId("count").max = String(card.limits.images);
}

async function loadVocabulary() {
  state.vocabulary = await ask("/vocabulary");
  byId("vocabulary").replaceChildren(...state.vocabulary.slice(0, 3000).map((word) => element("option", { value: word })));
  byId("known").hidden = !state.vocabulary.length;
  byId("known-words").replaceChildren(...state.vocabulary.slice(0, MAX_SHOWN_WORDS).map((word) => {
    const chip = element("button", { type: "button", className: "chip", textContent: word });
    chip.onclick = () => { const text = byId("text"); text.value = `${text.value.trimEnd()} ${word}`.trim(); };
    return chip;
  }));
}

async function start() {
  try {
    state.card = await ask("/model");
    describe(state.card);
    const draws = state.card.kind === "text" || state.card.kind === "unconditional";
    byId("draw-form").hidden = !draws;
    byId("translate-form").hidden = draws;
    document.querySelector(".sentence > label").hidden = byId("text").hidden = byId("text-hint").hidden = state.card.kind !== "text";
    if (state.card.kind === "text") { byId("text").focus(); await loadVocabulary(); }
    if (!draws) startTranslating();
  } catch (error) { fail(error); }
}

function startTranslating() {
  const { limits, attributes } = state.card;
  byId("file-hint").textContent = `Its central square is used; at most ${limits.upload_bytes >> 20} MB and ${limits.upload_pixels >> 20} megapixels.`;
  byId("domain-choice").hidden = attributes.length < 2;
  byId("domain").replaceChildren(...attributes.map((_, i) => element("option", { value: String(i), textContent: `data set ${i + 1}` })));
  fillSwitches(0);
}

function submit(id, run) {
  byId(id).addEventListener("submit", (event) => { event.preventDefault(); run(); });
}

submit("draw-form", draw);
submit("change-form", changeWord);
submit("way-form", goAnotherWay);
submit("translate-form", translate);
byId("slider").addEventListener("input", slide);
byId("stop").addEventListener("click", () => state.work?.abort());
byId("other-seed").addEventListener("click", () => { byId("seed").value = String(Math.floor(Math.random() * 1e6)); draw(); });
byId("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); draw(); }
});
byId("domain").addEventListener("change", () => fillSwitches(Number(byId("domain").value)));
byId("file").addEventListener("change", () => take(byId("file").files[0]));
for (const name of ["dragover", "dragleave", "drop"]) {
  byId("drop").addEventListener(name, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files[0]);
  });
}
start();
