// The page: what is chosen on it becomes a command, and what the command says is shown.

import type { Gpu, Method, Output, Progress, Reply, Request } from "./messages.js";

/** A file that was chosen. */
interface Chosen {
  /** What the program knows it by; two files have two names. */
  name: string;
  file: File;
  strength: number;
  /** What `inspect` tells of a LoRA. */
  adapter?: Adapter;
  /** Strengths of blocks that are not 1. */
  blocks: Map<string, number>;
  isCalibration: boolean;
  /** Whether it is what PEFT keeps beside an adapter's file. */
  isConfig: boolean;
  /** Why it cannot be read. */
  wrong?: string;
}

/** The event `adapter` of `inspect --json`, as far as the page shows it. */
interface Adapter {
  name: string;
  bytes: number;
  family: string;
  format: string;
  dtype: string;
  layers: number;
  rank_min: number;
  rank_max: number;
  metadata: Record<string, string>;
  tags: string[];
  blocks: { block: string; layers: number; norm: number | null }[];
  modules: { key: string; block: string }[];
}

/** What a command said and wrote. */
interface Told {
  text: string;
  events: Record<string, unknown>[];
  outputs: Output[];
}

class Failed extends Error {}

function byId<T extends HTMLElement>(id: string): T {
  const element = document.getElementById(id);
  if (element === null) throw new Error(`the page has no #${id}`);
  return element as T;
}

const go = byId<HTMLButtonElement>("go");
const cancel = byId<HTMLButtonElement>("cancel");
const overlap = byId<HTMLButtonElement>("overlap");
const method = byId<HTMLSelectElement>("method");
const style = byId<HTMLSelectElement>("style");
const calibration = byId<HTMLSelectElement>("calibration");

const chosen: Chosen[] = [];
let methods: Method[] = [];
let gpu: Gpu = { missing: "the program is not loaded" };
let saving: Output | undefined;

// ---- The worker ----

let worker: Worker;
let commands = 0;
/** The command that runs, and what it said so far. */
let running: { id: number; told: Told; end: (told: Told) => void; fail: (why: Failed) => void } | undefined;

function send(request: Request): void {
  worker.postMessage(request);
}

/** Where results go until they are saved: in a folder of the browser's that is this page's while it holds the lock. */
const folder = crypto.randomUUID();
void navigator.locks.request(folder, () => new Promise(() => undefined));

function startWorker(): void {
  worker = new Worker("worker.js", { type: "module" });
  worker.addEventListener("message", (event: MessageEvent<Reply>) => hear(event.data));
  worker.addEventListener("error", (event) => {
    say(`The program could not be loaded: ${event.message || "the browser gives no reason"}`);
  });
  send({ type: "start", folder, keep: saving?.file instanceof File ? [saving.file.name] : [] });
  for (const { name, file } of chosen) send({ type: "lend", name, file });
}

function hear(reply: Reply): void {
  if (reply.type === "ready") {
    if (methods.length === 0) showMethods(reply.methods);
    gpu = reply.gpu;
    showDevice(reply.version);
    return;
  }
  if (reply.type === "failed" && reply.id === 0) return fail(reply.message);
  if (running?.id !== reply.id) return;
  const { told, end, fail: refuse } = running;
  if (reply.type === "event") told.events.push(reply.event);
  else if (reply.type === "text") told.text += reply.text;
  else if (reply.type === "progress") showProgress(reply.progress);
  else {
    running = undefined;
    if (reply.type === "done") end({ ...told, outputs: reply.outputs });
    else {
      // Nothing of a program that crashed can be relied on.
      if (reply.crashed) restart();
      refuse(new Failed(reply.message));
    }
  }
}

function restart(): void {
  worker.terminate();
  startWorker();
}

/** One command at a time: the next waits for those before it. */
let last: Promise<unknown> = Promise.resolve();

function run(args: string[], outputs: string[] = []): Promise<Told> {
  const next = last.then(() => {
    commands += 1;
    const id = commands;
    return new Promise<Told>((end, fail) => {
      running = { id, told: { text: "", events: [], outputs: [] }, end, fail };
      send({ type: "run", id, args, outputs });
    });
  });
  last = next.catch(() => undefined);
  return next;
}

function showDevice(version: string): void {
  const cpu = "Computes on the CPU, in WebAssembly with SIMD";
  const text = !("name" in gpu)
    ? `${cpu}: ${gpu.missing}.`
    : gpu.software
      ? `${cpu}: the GPU of this browser (${gpu.name}) is one in software, which is slower, and can be chosen below.`
      : `Computes on ${gpu.name}, through WebGPU, or on the CPU if you say so below.`;
  byId("device").textContent = `${text} loraweld ${version}.`;
  const on = byId<HTMLSelectElement>("on");
  // Only at first: later it is as it was chosen.
  if (on.disabled && "name" in gpu && gpu.software) on.value = "cpu";
  on.disabled = !("name" in gpu);
  update();
}

// ---- Files ----

/** What PEFT writes beside `adapter_model.safetensors`; it says the alpha. */
const CONFIG = "adapter_config.json";
const EXTENSION = /\.safetensors$/i;

/** A name that no other file has, and that no argument is taken for. */
function nameFor(file: File): string {
  const taken = new Set(chosen.map((other) => other.name));
  const plain = file.name.startsWith("-") ? `_${file.name}` : file.name;
  let name = plain;
  for (let i = 2; taken.has(name); i++) name = plain.replace(EXTENSION, "") + ` (${i}).safetensors`;
  return name;
}

async function add(files: Iterable<File>): Promise<void> {
  const added: Chosen[] = [];
  for (const file of files) {
    const one: Chosen = { name: nameFor(file), file, strength: 1, blocks: new Map(), isCalibration: false, isConfig: CONFIG === file.name };
    chosen.push(one);
    added.push(one);
    send({ type: "lend", name: one.name, file });
  }
  say(`${added.length === 1 ? "One file was" : `${added.length} files were`} added.`);
  update();
  // An adapter that was read without its settings is read anew.
  const again = added.some((one) => one.isConfig) ? chosen.filter((one) => one.name === "adapter_model.safetensors") : [];
  for (const one of new Set([...added, ...again])) {
    if (one.isConfig) continue;
    delete one.wrong;
    try {
      const told = await run(["inspect", one.name]);
      one.adapter = told.events.find((event) => event["event"] === "adapter") as unknown as Adapter | undefined;
      if (one.adapter === undefined) one.wrong = `This is no LoRA:\n${told.text.trim()}`;
    } catch (error) {
      one.isCalibration = await isCalibration(one.name);
      if (!one.isCalibration) one.wrong = messageOf(error);
    }
    update();
  }
  await match();
}

async function isCalibration(name: string): Promise<boolean> {
  try {
    await run(["calibration", "show", name]);
    return true;
  } catch {
    return false;
  }
}

function remove(one: Chosen): void {
  chosen.splice(chosen.indexOf(one), 1);
  send({ type: "forget", name: one.name });
  say(`${one.name} was removed.`);
  update();
  void match();
}

function loras(): Chosen[] {
  return chosen.filter((one) => one.adapter !== undefined);
}

/** Shows what matches, and what does not and why. */
async function match(): Promise<void> {
  // Those that are shown are of other files.
  byId("overlaps").hidden = true;
  const names = loras().map((one) => one.name);
  byId("inspected").hidden = names.length === 0;
  const matched = byId("matched");
  matched.hidden = names.length < 2;
  if (names.length === 0) return;
  try {
    const told = await run(["inspect", ...names]);
    byId("inspection").textContent = told.text;
    const start = told.text.lastIndexOf("\nmatch: ");
    matched.textContent = start < 0 ? "" : told.text.slice(start + 1).trim();
  } catch (error) {
    matched.hidden = false;
    matched.textContent = messageOf(error);
  }
}

function facts(adapter: Adapter): string {
  const rank = adapter.rank_min === adapter.rank_max ? `${adapter.rank_min}` : `${adapter.rank_min} to ${adapter.rank_max}`;
  const triggers = [adapter.metadata["modelspec.trigger_phrase"], ...adapter.tags.slice(0, 6)].filter(Boolean);
  const all = [
    adapter.family,
    `${adapter.format} keys`,
    `${adapter.layers} layers`,
    `rank ${rank}`,
    adapter.dtype,
    bytesOf(adapter.bytes),
  ];
  if (triggers.length > 0) all.push(`trigger words: ${triggers.join(", ")}`);
  return all.join(" · ");
}

function bytesOf(bytes: number): string {
  const units = ["B", "KiB", "MiB", "GiB"];
  let i = 0;
  for (; bytes >= 1024 && i < 3; i++) bytes /= 1024;
  return `${i === 0 ? bytes : bytes.toFixed(1)}\u00a0${units[i]}`;
}

function element<K extends keyof HTMLElementTagNameMap>(tag: K, text = "", name = ""): HTMLElementTagNameMap[K] {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = name;
  return made;
}

let sliders = 0;

/** A slider, and a field beside it for what the slider does not reach. */
function slider(label: string, note: string, value: number, change: (value: number) => void): HTMLElement {
  sliders += 1;
  const id = `strength-${sliders}`;
  const row = element("div", "", "strength");
  const name = element("label", label);
  name.htmlFor = id;
  if (note !== "") name.append(element("small", note));
  const range = element("input");
  Object.assign(range, { id, type: "range", min: "-1", max: "2", step: "0.05", value: String(value) });
  const field = element("input");
  Object.assign(field, { type: "number", step: "any", value: String(value), ariaLabel: `${label}, as a number` });
  const set = (text: string, other: HTMLInputElement): void => {
    const given = Number(text);
    if (text.trim() === "" || !Number.isFinite(given)) return;
    other.value = text;
    change(given);
    showCommand();
  };
  range.addEventListener("input", () => set(range.value, field));
  field.addEventListener("input", () => set(field.value, range));
  row.append(name, range, field);
  return row;
}

function card(one: Chosen): HTMLElement {
  const item = element("li", "", one.wrong === undefined ? "" : "wrong");
  const head = element("div", "", "head");
  const drop = element("button", "Remove");
  drop.type = "button";
  drop.ariaLabel = `Remove ${one.name}`;
  drop.addEventListener("click", () => remove(one));
  head.append(element("h3", one.name), drop);
  item.append(head);
  if (one.wrong !== undefined) item.append(element("p", one.wrong));
  else if (one.isCalibration) item.append(element("p", "A calibration: choose it below to measure what is lost.", "facts"));
  else if (one.isConfig) item.append(element("p", "What PEFT says of the adapter beside it.", "facts"));
  else if (one.adapter === undefined) item.append(element("p", "It is being read.", "facts"));
  else item.append(...controls(one, one.adapter));
  return item;
}

function controls(one: Chosen, adapter: Adapter): HTMLElement[] {
  const strength = slider("Strength", "", one.strength, (value) => {
    one.strength = value;
  });
  const blocks = element("details", "", "blocks");
  blocks.append(element("summary", `Strength of each block (${adapter.blocks.length}), and the norm of its update`));
  blocks.addEventListener("toggle", () => {
    if (!blocks.open || blocks.childElementCount > 1) return;
    for (const { block, layers, norm } of adapter.blocks) {
      const note = `${layers} layers${norm === null ? "" : `, norm ${norm.toFixed(3)}`}`;
      const row = slider(block, note, one.blocks.get(block) ?? 1, (value) => {
        if (value === 1) one.blocks.delete(block);
        else one.blocks.set(block, value);
      });
      blocks.append(row);
    }
  });
  blocks.open = one.blocks.size > 0;
  return [element("p", facts(adapter), "facts"), strength, blocks];
}

// ---- The command ----

/** How the strength of a block is said: by the start of its layers' names, if no other layers begin so. */
function patterns(adapter: Adapter, block: string): string[] {
  const inside = adapter.modules.filter((module) => module.block === block).map((module) => module.key);
  const start = `${block}_`;
  const begin = adapter.modules.filter((module) => module.key.startsWith(start)).length;
  return begin === inside.length && inside.every((key) => key.startsWith(start)) ? [`${start}*`] : inside;
}

/** Splits what was typed as a shell does, quotes and all. */
function words(text: string): string[] {
  const found = text.match(/"[^"]*"|'[^']*'|\S+/g) ?? [];
  return found.map((word) => word.replace(/^(["'])(.*)\1$/, "$2"));
}

function command(report: string): string[] {
  const args = ["merge", method.value];
  const taken = loras();
  const said = (one: Chosen): string => (one.strength === 1 ? one.name : `${one.name}:${one.strength}`);
  if (methods.find((m) => m.name === method.value)?.style === true) {
    const kept = taken.find((one) => one.name === style.value) ?? taken[0];
    if (kept !== undefined) args.push("--style", said(kept));
    for (const one of taken) if (one !== kept) args.push("--subject", said(one));
  } else args.push(...taken.map(said));
  for (const one of taken) {
    const whose = one.adapter?.name ?? "";
    for (const [block, value] of one.blocks)
      for (const pattern of one.adapter === undefined ? [] : patterns(one.adapter, block))
        args.push("--strength-for", `${whose}:${pattern}=${value}`);
  }
  const needs = methods.find((m) => m.name === method.value)?.calibration === true;
  if (calibration.value !== "") args.push("--calibration", calibration.value);
  else if (needs) args.push("--calibration", "none");
  for (const id of ["rank", "dtype", "format"]) {
    const value = byId<HTMLInputElement>(id).value;
    if (value !== "" && value !== "same") args.push(`--${id}`, value);
  }
  args.push(...words(byId<HTMLInputElement>("more").value));
  args.push("--output", output());
  if (report !== "") args.push("--report", report);
  return args;
}

function output(): string {
  const name = byId<HTMLInputElement>("output").value.trim();
  return name === "" ? "merged.safetensors" : EXTENSION.test(name) ? name : `${name}.safetensors`;
}

function device(): string[] {
  const wants = byId<HTMLSelectElement>("on").value;
  return ["--device", wants === "cpu" || !("name" in gpu) ? "cpu" : "gpu"];
}

function showCommand(): void {
  const plain = /^[\w/.,:=@%+-]+$/;
  const quoted = command("").map((word) => (plain.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`));
  byId("command").textContent = ["loraweld", ...quoted].join(" ");
}

// ---- What is shown ----

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** Tells it to those who cannot see it. */
function say(text: string): void {
  byId("said").textContent = text;
}

function fail(message: string): void {
  const box = byId("error");
  box.hidden = false;
  box.textContent = `error: ${message}`;
}

function fill(select: HTMLSelectElement, options: [string, string][]): void {
  const before = select.value;
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  if (options.some(([value]) => value === before)) select.value = before;
}

function showMethods(all: Method[]): void {
  methods = all;
  fill(method, all.map((m) => [m.name, m.name]));
  method.value = "linear";
  update();
}

function update(): void {
  const list = byId("files");
  list.replaceChildren(...chosen.map(card));
  const taken = loras();
  fill(style, taken.map((one) => [one.name, one.name]));
  fill(calibration, [["", "none"], ...chosen.filter((one) => one.isCalibration).map((one): [string, string] => [one.name, one.name])]);
  const now = methods.find((m) => m.name === method.value);
  byId("style-field").hidden = now?.style !== true;
  byId("summary").textContent = now?.summary ?? "";
  const busy = working;
  go.disabled = busy || taken.length === 0 || methods.length === 0;
  overlap.disabled = busy || taken.length === 0;
  overlap.textContent = taken.length === 1 ? "Show norms" : "Show overlaps and norms";
  showCommand();
}

const STAGES: Record<string, string> = {
  survey: "Looking at all layers",
  merge: "Merging",
  truncate: "Lowering ranks",
  measure: "Measuring losses",
  overlap: "Comparing",
  "calibrate-singular-values": "Calibrating singular values",
};

function showProgress({ stage, item, done, total }: Progress): void {
  byId("stage").textContent = `${STAGES[stage] ?? stage}: ${done} of ${total}${item === "" ? "" : ` – ${item}`}`;
  const bar = byId<HTMLProgressElement>("progress");
  bar.max = Math.max(total, 1);
  bar.value = done;
}

let working = false;
let cancelled = false;

/** Runs something that takes long, with its progress shown and a way to end it. */
async function long(what: string, task: () => Promise<void>): Promise<void> {
  working = true;
  cancelled = false;
  byId("error").hidden = true;
  byId("doing").hidden = false;
  byId("stage").textContent = what;
  byId<HTMLProgressElement>("progress").removeAttribute("value");
  cancel.hidden = false;
  say(what);
  update();
  try {
    await task();
  } catch (error) {
    if (cancelled) say("It was cancelled; nothing was written.");
    else fail(messageOf(error));
  } finally {
    working = false;
    byId("doing").hidden = true;
    cancel.hidden = true;
    update();
  }
}

/** Shows the sections of a page that the program wrote. */
async function showReport(into: HTMLElement, page: Blob, sections: (title: string) => boolean): Promise<void> {
  const text = await page.text();
  const main = text.slice(text.indexOf("<main>"), text.lastIndexOf("</main>") + "</main>".length);
  // The page's policy takes no styles from text. Quotes of names are escaped, so that none can look like this.
  const parsed = new DOMParser().parseFromString(main.replaceAll(' style="--h:', ' data-heat="'), "text/html");
  const found = [...parsed.querySelectorAll("main > header > .verdict, main > .numbers, main > section")];
  const kept = found.filter((part) => part.tagName !== "SECTION" || sections(part.querySelector("h2")?.textContent ?? ""));
  for (const coloured of parsed.querySelectorAll<HTMLElement>("[data-heat]")) {
    coloured.style.setProperty("--h", coloured.dataset["heat"] ?? "0");
  }
  into.replaceChildren(...kept.map((part) => document.adoptNode(part)));
  into.hidden = false;
  (window as { tables?: (root: ParentNode) => void }).tables?.(into);
}

overlap.addEventListener("click", () => {
  void long("Comparing the files", async () => {
    const names = loras().map((one) => one.name);
    const report = "overlap.html";
    const more = names.length > 1 ? ["--overlap"] : [];
    const told = await run(["inspect", ...names, "--norms", ...more, "--report", report, "--force"], [report]);
    const page = told.outputs.find((output) => output.name === report);
    const leave = ["Files", "How it was made", "What to try next", "Warnings"];
    if (page !== undefined) await showReport(byId("overlaps"), page.file, (title) => !leave.includes(title));
    say("Overlaps and norms are shown.");
  });
});

byId("merge").addEventListener("submit", (event) => {
  event.preventDefault();
  if (go.disabled) return;
  const [name, report] = [output(), "report.html"];
  byId("result").hidden = true;
  saving = undefined;
  void long("The merge begins", async () => {
    const told = await run([...command(report), "--force", ...device()], [name, report]);
    saving = told.outputs.find((output) => output.name === name);
    const warnings = told.events.filter((event) => event["event"] === "warning");
    const list = byId("warnings");
    list.hidden = warnings.length === 0;
    list.replaceChildren(...warnings.map((warning) => element("li", String(warning["message"]))));
    byId("words").textContent = told.text;
    byId("saved").textContent = "";
    byId("save").textContent = `Save ${name}${saving === undefined ? "" : ` (${bytesOf(saving.file.size)})`}`;
    const page = told.outputs.find((output) => output.name === report);
    const leave = ["How it was made", "What to try next", "Warnings"];
    if (page !== undefined) await showReport(byId("report"), page.file, (title) => !leave.includes(title));
    byId("result").hidden = false;
    byId("result").focus();
    say("The merge is done.");
  });
});

cancel.addEventListener("click", () => {
  if (running === undefined) return;
  const { fail } = running;
  running = undefined;
  cancelled = true;
  restart();
  fail(new Failed("cancelled"));
});

/** Asks where to, if the browser can, and copies the result there; else the browser downloads it. */
async function save({ name, file }: Output): Promise<void> {
  const pick = (window as { showSaveFilePicker?: (options: object) => Promise<FileSystemFileHandle> }).showSaveFilePicker;
  if (pick !== undefined) {
    let target: FileSystemFileHandle;
    try {
      target = await pick.call(window, { suggestedName: name });
    } catch (error) {
      if (error instanceof DOMException && error.name === "AbortError") return;
      throw error;
    }
    byId("saved").textContent = "It is being written.";
    // The file is replaced when all of it is there.
    await file.stream().pipeTo(await target.createWritable());
    byId("saved").textContent = `It was written to ${target.name}.`;
    return;
  }
  const link = element("a");
  link.href = URL.createObjectURL(file);
  link.download = name;
  link.click();
  // The browser reads from it for as long as it downloads.
  setTimeout(() => URL.revokeObjectURL(link.href), 600_000);
  byId("saved").textContent = "It is among your downloads.";
}

byId("save").addEventListener("click", () => {
  if (saving !== undefined) save(saving).catch((error: unknown) => fail(`${saving?.name}: cannot write: ${messageOf(error)}`));
});

byId("choose").addEventListener("change", (event) => {
  const input = event.target as HTMLInputElement;
  void add([...(input.files ?? [])]);
  input.value = "";
});

const drop = byId("drop");
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, () => drop.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  void add([...(event.dataTransfer?.files ?? [])]);
});

byId("merge").addEventListener("input", () => {
  const now = methods.find((m) => m.name === method.value);
  byId("style-field").hidden = now?.style !== true;
  byId("summary").textContent = now?.summary ?? "";
  showCommand();
});

window.addEventListener("beforeunload", (event) => {
  if (working) event.preventDefault();
});

startWorker();
if ("serviceWorker" in navigator) navigator.serviceWorker.register("offline.js").catch(() => undefined);
