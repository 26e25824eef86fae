// The worker: runs the program, one command after the other, so that the page never stands still.

import { suspends } from "./jspi.js";
import init, * as program from "./loraweld.js";
import type { Gpu, Output, Reply, Request } from "./messages.js";

declare const self: DedicatedWorkerGlobalScope;

/** Room for a file that the program writes, in the browser's private file system. */
interface Room {
  name: string;
  file: FileSystemFileHandle;
  access: FileSystemSyncAccessHandle;
}

/** The program's memory, which never becomes smaller. */
let memory: WebAssembly.Memory | undefined;
/** The command that runs. */
let running = 0;
/** How it ended, as the program told. */
let ended: { failed?: string; panicked?: string } = {};

function reply(message: Reply): void {
  self.postMessage(message);
}

function hear(kind: string, message: string): void {
  const id = running;
  if (kind === "event") reply({ type: "event", id, event: JSON.parse(message) });
  else if (kind === "progress") reply({ type: "progress", id, progress: JSON.parse(message) });
  else if (kind === "text") reply({ type: "text", id, text: message });
  else if (kind === "failed") ended = { failed: message };
  else if (kind === "panic") ended = { panicked: message };
}

async function findGpu(): Promise<Gpu> {
  type Info = Record<"description" | "device" | "architecture" | "vendor", string> & { isFallbackAdapter?: boolean };
  const gpu = (navigator as { gpu?: { requestAdapter(): Promise<{ info: Info } | null> } }).gpu;
  if (gpu === undefined) return { missing: "this browser has no WebGPU" };
  if (!suspends) return { missing: "this browser cannot suspend WebAssembly (JSPI), which waiting for a GPU takes" };
  const adapter = await gpu.requestAdapter().catch(() => null);
  if (adapter === null) return { missing: "this browser has WebGPU, but no GPU for it" };
  const { description, device, architecture, vendor } = adapter.info;
  const name = description || device || [vendor, architecture].filter(Boolean).join(" ") || "a GPU";
  return { name, software: adapter.info.isFallbackAdapter === true || architecture === "swiftshader" };
}

/** The name of this page's folder of results, and the folder, if the browser has room for one. */
let own = "";
let results: FileSystemDirectoryHandle | undefined;

async function openFolder(name: string, keep: string[]): Promise<void> {
  own = name;
  try {
    const root = await navigator.storage.getDirectory();
    results = await root.getDirectoryHandle(own, { create: true });
    // What a worker had open that was ended a moment ago may still be so.
    for (const delay of [0, 1000, 5000]) setTimeout(() => void clean(root), delay);
    left = (await namesOf(results)).filter((name) => !keep.includes(name));
  } catch {
    // Private windows of some browsers have none: memory is what is left.
  }
}

/** Files of commands that were cancelled. */
let left: string[] = [];

async function namesOf(folder: FileSystemDirectoryHandle): Promise<string[]> {
  const names: string[] = [];
  for await (const name of folder.keys()) names.push(name);
  return names;
}

/** Removes what cancelled commands left, and the folders of pages that are gone, whose locks are free. */
async function clean(root: FileSystemDirectoryHandle): Promise<void> {
  for (const name of left) await results?.removeEntry(name).catch(() => undefined);
  for (const name of await namesOf(root)) {
    if (name === own) continue;
    await navigator.locks.request(name, { ifAvailable: true }, async (lock) => {
      if (lock !== null) await root.removeEntry(name, { recursive: true }).catch(() => undefined);
    });
  }
}

/** What commands of a kind wrote last: the page does not need it any more when the next one runs. */
const written = new Map<string, string[]>();

async function makeRoom(count: number): Promise<Room[]> {
  const rooms: Room[] = [];
  for (let i = 0; results !== undefined && i < count; i++) {
    try {
      const name = crypto.randomUUID();
      const file = await results.getFileHandle(name, { create: true });
      const access = await file.createSyncAccessHandle();
      rooms.push({ name, file, access });
    } catch {
      break;
    }
  }
  program.give_room(rooms.map((room) => room.access));
  return rooms;
}

async function run(id: number, args: string[], names: string[]): Promise<void> {
  running = id;
  ended = {};
  // A merge whose ranks turn out lower than planned is written twice.
  const [kind] = args;
  for (const old of written.get(kind ?? "") ?? []) await results?.removeEntry(old).catch(() => undefined);
  const rooms = names.length > 0 ? await makeRoom(names.length + 1) : [];
  let crashed = false;
  try {
    await program.run(args);
  } catch (error) {
    crashed = true;
    const why = ended.panicked ?? String(error);
    ended = { failed: `internal error: ${why}; please report it` };
  }
  const outputs: Output[] = [];
  const kept = new Set<string>();
  // After a crash, the program is in no state to be asked.
  for (const name of crashed ? [] : names) {
    const taken = program.take(name);
    const room = rooms.find((room) => room.access === taken);
    if (room !== undefined && ended.failed === undefined) {
      room.access.flush();
      room.access.close();
      kept.add(room.name);
      outputs.push({ name, file: await room.file.getFile() });
    } else if (taken instanceof Uint8Array) {
      outputs.push({ name, file: new Blob([taken as Uint8Array<ArrayBuffer>]) });
    }
  }
  for (const room of rooms) {
    if (kept.has(room.name)) continue;
    room.access.close();
    await results?.removeEntry(room.name).catch(() => undefined);
  }
  if (kind !== undefined) written.set(kind, [...kept]);
  if (ended.failed !== undefined) reply({ type: "failed", id, message: ended.failed, crashed });
  else reply({ type: "done", id, outputs, memory: memory?.buffer.byteLength ?? 0 });
}

async function answer(request: Request): Promise<void> {
  if (request.type === "start") await start(request.folder, request.keep);
  else if (request.type === "lend") program.lend(request.name, request.file);
  else if (request.type === "forget") program.forget(request.name);
  else await run(request.id, request.args, request.outputs);
}

async function start(folder: string, keep: string[]): Promise<void> {
  await openFolder(folder, keep);
  ({ memory } = await init());
  program.listen(hear);
  const gpu = await findGpu();
  reply({ type: "ready", version: program.version(), methods: JSON.parse(program.methods()), gpu });
}

let last: Promise<void> = Promise.resolve();
self.addEventListener("message", (event: MessageEvent<Request>) => {
  const request = event.data;
  last = last.then(() => answer(request)).catch((error: unknown) => {
    reply({ type: "failed", id: 0, message: `internal error: ${String(error)}; please report it`, crashed: true });
  });
});
