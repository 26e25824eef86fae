// Browsers without JavaScript Promise Integration cannot suspend WebAssembly, which waiting for a GPU takes. On the CPU
// nothing waits, and what would suspend is never called: there, plain functions stand for the suspending ones.

interface Integration {
  Suspending?: unknown;
  promising?: unknown;
}

const wasm = WebAssembly as Integration;

/** Whether calls can be suspended here. */
export const suspends = typeof wasm.Suspending === "function";

if (!suspends) {
  wasm.Suspending = function (call: unknown) {
    return call;
  };
  wasm.promising =
    (call: (...args: unknown[]) => unknown) =>
    async (...args: unknown[]) =>
      call(...args);
}
