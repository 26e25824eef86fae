// What the page and its worker say to each other.

/** What the page asks for. Each is done after those before it. */
export type Request =
  /** Comes first. `folder`: where results go, which the page holds a lock of this name for. `keep`: those that it still needs. */
  | { type: "start"; folder: string; keep: string[] }
  | { type: "lend"; name: string; file: Blob }
  | { type: "forget"; name: string }
  /** `outputs`: the names of files that the command writes. */
  | { type: "run"; id: number; args: string[]; outputs: string[] };

/** What the worker tells. */
export type Reply =
  | { type: "ready"; version: string; methods: Method[]; gpu: Gpu }
  /** An event of the command line's `--json`. */
  | { type: "event"; id: number; event: Record<string, unknown> }
  /** What the command line prints. */
  | { type: "text"; id: number; text: string }
  | { type: "progress"; id: number; progress: Progress }
  /** `memory`: the most bytes of it that the program had until now. */
  | { type: "done"; id: number; outputs: Output[]; memory: number }
  | { type: "failed"; id: number; message: string; crashed: boolean };

export interface Method {
  name: string;
  summary: string;
  /** Whether it needs a calibration, and whether one adapter is the style. */
  calibration: boolean;
  style: boolean;
}

/** The GPU that would be taken, and whether it is one in software; or why there is none. */
export type Gpu = { name: string; software: boolean } | { missing: string };

export interface Progress {
  stage: string;
  item: string;
  done: number;
  total: number;
}

/** A file that was written. */
export interface Output {
  name: string;
  file: Blob;
}
