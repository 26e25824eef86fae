// The service worker: keeps the page's own files, so that it works without a network once it was loaded.

const scope = self as unknown as ServiceWorkerGlobalScope;

/** Set when the page is built: it changes with every file. */
const VERSION = "@VERSION@";
const FILES = [
  "./",
  "app.js",
  "icon.svg",
  "jspi.js",
  "loraweld.js",
  "loraweld_bg.wasm",
  "page.css",
  "report.css",
  "report.js",
  "worker.js",
];

scope.addEventListener("install", (event) => {
  const fill = async (): Promise<void> => {
    const cache = await caches.open(VERSION);
    await cache.addAll(FILES.map((file) => new Request(file, { cache: "reload" })));
    await scope.skipWaiting();
  };
  event.waitUntil(fill());
});

scope.addEventListener("activate", (event) => {
  const clean = async (): Promise<void> => {
    const old = (await caches.keys()).filter((key) => key !== VERSION);
    await Promise.all(old.map((key) => caches.delete(key)));
    await scope.clients.claim();
  };
  event.waitUntil(clean());
});

scope.addEventListener("fetch", (event) => {
  const find = async (): Promise<Response> => {
    const cache = await caches.open(VERSION);
    return (await cache.match(event.request, { ignoreSearch: true })) ?? fetch(event.request);
  };
  event.respondWith(find());
});
