// Serves the built page, as any server of static files does, for trying it out and for its tests.

import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, normalize, sep } from "node:path";
import { fileURLToPath } from "node:url";

const TYPES = {
  ".css": "text/css; charset=utf-8",
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".svg": "image/svg+xml",
  ".wasm": "application/wasm",
};

/** Folders by the paths that they are served under; the longest path that fits counts. */
export function serve(folders, port = 0) {
  const paths = Object.keys(folders).sort((x, y) => y.length - x.length);
  const server = createServer(async (request, response) => {
    try {
      const { pathname } = new URL(request.url, "http://localhost");
      const under = paths.find((path) => pathname.startsWith(path));
      const inside = normalize(decodeURIComponent(pathname.slice(under.length)) || "index.html");
      const file = join(folders[under], inside);
      if (!file.startsWith(folders[under] + sep)) throw new Error("outside");
      const { size } = await stat(file);
      const headers = { "content-type": TYPES[extname(file)] ?? "application/octet-stream", "content-length": size };
      response.writeHead(200, { ...headers, "cache-control": "no-store", "x-content-type-options": "nosniff" });
      createReadStream(file).pipe(response);
    } catch {
      response.writeHead(404, { "content-type": "text/plain" }).end("There is no such file.\n");
    }
  });
  return new Promise((resolve, reject) => {
    server.on("error", reject);
    server.listen(port, "127.0.0.1", () => resolve(server));
  });
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const dist = fileURLToPath(new URL("../target/web/dist", import.meta.url));
  const server = await serve({ "/": dist }, Number(process.env.PORT ?? 8080));
  console.log(`http://127.0.0.1:${server.address().port}/`);
}
