// Tests of the page in a real browser, against the command line. Run by `scripts/web.sh test [PART OF A NAME]...`.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, statSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

import { serve } from "../serve.mjs";
import { difference, flux, headOf, makeLora } from "./safetensors.mjs";

const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const data = here("../../tests/data");
const dist = here("../../target/web/dist");
const pictures = here("../../target/web/pictures");
const loraweld = process.env.LORAWELD;
const folder = mkdtempSync(join(tmpdir(), "loraweld-web-"));
mkdirSync(pictures, { recursive: true });

// SwiftShader, a GPU in software, so that WebGPU is there on any machine.
const GPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan,WebGPU"];

// ---- What the tests have ----

const loras = (name) => join(data, "loras", `${name}.safetensors`);
const [mirror, rot90, invert] = ["concept_c3_mirror", "concept_c7_rot90", "concept_c4_invert"].map(loras);
const [heart, gradient, shade] = ["content_heart", "style_gradient", "style_shade"].map(loras);

/** Runs the command line in the tests' folder. */
function native(args) {
  return execFileSync(loraweld, args, { cwd: folder, encoding: "utf8", stdio: "pipe" });
}

/** The error that the command line ends with. */
function nativeError(args) {
  try {
    native(args);
  } catch (error) {
    // Without the hints that follow after an empty line, as other hosts of the command line have it.
    const [, message] = /^error: (.*?)\n(?:\n|$)/ms.exec(error.stderr);
    return message.split("\n").map((line) => line.trim()).join(" ");
  }
  throw new Error(`the command line takes it: ${args.join(" ")}`);
}

/** Lends files in the tests' folder to the command line as the page does to the program: by their names. */
function lend(paths) {
  return paths.map((path) => {
    const name = path.split("/").at(-1);
    writeFileSync(join(folder, name), readFileSync(path));
    return name;
  });
}

/** A page whose worker takes commands: `run` of the window gives what it replied. */
async function program(browser, files = []) {
  const page = await browser.newPage();
  page.on("pageerror", (error) => console.error("page:", error));
  page.on("console", (message) => message.type() === "error" && console.error("page:", message.text()));
  await page.goto(`${address}empty.html`);
  await page.evaluate(async () => {
    const worker = new Worker("worker.js", { type: "module" });
    let hear;
    worker.onmessage = (event) => hear(event.data);
    const folder = crypto.randomUUID();
    void navigator.locks.request(folder, () => new Promise(() => undefined));
    worker.postMessage({ type: "start", folder, keep: [] });
    const ready = await new Promise((resolve) => (hear = resolve));
    if (ready.type !== "ready") throw new Error(ready.message);
    window.ready = ready;
    window.lend = async (name) => {
      const file = await (await fetch(`fixtures/${encodeURIComponent(name)}`)).blob();
      worker.postMessage({ type: "lend", name, file });
    };
    window.lendFile = (name, file) => worker.postMessage({ type: "lend", name, file });
    window.run = (args, outputs, sizes) => {
      const told = { text: "", events: [] };
      worker.postMessage({ type: "run", id: 1, args, outputs });
      return new Promise((resolve) => {
        hear = async (reply) => {
          if (reply.type === "text") told.text += reply.text;
          if (reply.type === "event") told.events.push(reply.event);
          if (reply.type === "failed") resolve({ ...told, error: reply.message });
          if (reply.type !== "done") return;
          told.memory = reply.memory;
          // Large files stay where they are.
          told.sizes = Object.fromEntries(reply.outputs.map(({ name, file }) => [name, file.size]));
          if (sizes) return resolve(told);
          told.outputs = {};
          for (const { name, file } of reply.outputs) {
            const bytes = new Uint8Array(await file.arrayBuffer());
            let text = "";
            for (let i = 0; i < bytes.length; i += 0x8000) text += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
            told.outputs[name] = btoa(text);
          }
          resolve(told);
        };
      });
    };
    // Files of earlier commands would be in the way of later ones of the same name.
    window.forget = (name) => worker.postMessage({ type: "forget", name });
  });
  for (const name of lend(files)) await page.evaluate((name) => window.lend(name), name);
  return page;
}

const run = (page, args, outputs = [], sizes = false) =>
  page.evaluate(([args, outputs, sizes]) => window.run(args, outputs, sizes), [args, outputs, sizes]);

/** Merges by every method, and with what changes how a result is written. */
function merges() {
  const calibration = "pair.calibration.safetensors";
  const inputs = [mirror, rot90].map((path) => path.replace("/loras/", "/activations/step1/"));
  native(["calibrate", mirror, rot90, "--activations", ...inputs, "-o", calibration, "--force", "--device", "cpu"]);
  const pair = ["concept_c3_mirror.safetensors", "concept_c7_rot90.safetensors:0.8"];
  const [content, style] = ["content_heart.safetensors", "style_gradient.safetensors"];
  const methods = JSON.parse(readFileSync(here("./merges.json"), "utf8"));
  const files = { pair, style: ["--style", style, "--subject", content], calibration: ["--calibration", calibration] };
  return methods.map(({ name, exact, args }) => ({ name, exact: exact === true, args: args.flatMap((arg) => files[arg.slice(1)] ?? [arg]) }));
}

async function compareMerges(page, device, same) {
  const failed = [];
  const skipped = (process.env.SKIP ?? "").split(",");
  for (const { name, exact, args } of merges()) {
    if (skipped.includes(name)) continue;
    const output = "out.safetensors";
    const all = [...args, "-o", output, "--force"];
    const started = performance.now();
    const told = await run(page, [...all, "--device", device], [output]);
    const seconds = (performance.now() - started) / 1000;
    native([...all, "--device", "cpu"]);
    const expected = readFileSync(join(folder, output));
    try {
      assert.equal(told.error, undefined);
      const text = same(Buffer.from(told.outputs[output], "base64"), expected, exact);
      console.log(`  ${name}: ${text}, ${seconds.toFixed(2)} s`);
    } catch (error) {
      failed.push(`${name}: ${error.message}`);
      console.log(`  ${name}: FAILED, ${seconds.toFixed(2)} s: ${error.message}`);
    }
  }
  assert.deepEqual(failed, []);
}

// ---- The tests ----

const tests = {
  // Compilers for the two machines round long products differently: what hangs on those is the same to the last digits
  // of f32, where singular vectors may have changed their signs in pairs.
  async "merges on the CPU are the command line's"(browser) {
    const page = await program(browser, [mirror, rot90, invert, heart, gradient, shade]);
    merges();
    await page.evaluate(() => window.lend("pair.calibration.safetensors"));
    await compareMerges(page, "cpu", (found, expected, exact) => {
      if (found.equals(expected)) return "the same to the bit";
      const { worst } = difference(found, expected);
      assert.ok(!exact && worst <= 1e-7, `a layer is off by ${worst}`);
      return `off by ${worst.toExponential(1)} at most`;
    });
  },

  async "merges on WebGPU are near"(browser) {
    const page = await program(browser, [mirror, rot90, invert, heart, gradient, shade]);
    assert.ok(await page.evaluate(() => "name" in window.ready.gpu), "there is no GPU");
    merges();
    await page.evaluate(() => window.lend("pair.calibration.safetensors"));
    // The kernels that it launches, by the names of their pipelines.
    const worker = page.workers()[0];
    await worker.evaluate(() => {
      self.launched = new Set();
      const names = new WeakMap();
      const create = GPUDevice.prototype.createComputePipeline;
      GPUDevice.prototype.createComputePipeline = function (descriptor) {
        const pipeline = create.call(this, descriptor);
        names.set(pipeline, descriptor.label);
        return pipeline;
      };
      const set = GPUComputePassEncoder.prototype.setPipeline;
      GPUComputePassEncoder.prototype.setPipeline = function (pipeline) {
        self.launched.add(names.get(pipeline));
        return set.call(this, pipeline);
      };
    });
    await compareMerges(page, "gpu", (found, expected) => {
      const { worst, tolerance } = difference(found, expected);
      assert.ok(worst <= tolerance, `a layer is off by ${worst}, and ${tolerance} is allowed`);
      return `off by ${worst.toExponential(1)} at most`;
    });
    const launched = await worker.evaluate(() => [...self.launched].sort());
    console.log(`  by ${launched.length} kernels: ${launched.join("; ")}`);
  },

  async "bad files are refused in the command line's words"(browser) {
    const good = readFileSync(mirror);
    const bad = {
      "empty.safetensors": Buffer.alloc(0),
      "short.safetensors": good.subarray(0, 5),
      "cut.safetensors": good.subarray(0, good.length - 100),
      "header.safetensors": good.subarray(0, 200),
      "text.safetensors": Buffer.from("this is no safetensors file at all"),
      "pickle.safetensors": Buffer.from("PK\x03\x04 and so on, for a while"),
      "gguf.safetensors": Buffer.from("GGUF and so on, for a while"),
      "long.safetensors": Buffer.concat([good, Buffer.alloc(8)]),
    };
    for (const [name, bytes] of Object.entries(bad)) writeFileSync(join(folder, name), bytes);
    const page = await program(browser, [mirror, rot90, gradient]);
    for (const name of Object.keys(bad)) await page.evaluate((name) => window.lend(name), name);
    const commands = [
      ...Object.keys(bad).map((name) => ["inspect", name]),
      ...Object.keys(bad).map((name) => ["merge", "linear", "concept_c3_mirror.safetensors", name, "-o", "x.safetensors"]),
      ["merge", "linear", "concept_c3_mirror.safetensors:nan", "-o", "x.safetensors"],
      ["merge", "ssr", "concept_c3_mirror.safetensors", "-o", "x.safetensors"],
      ["merge", "linear", "concept_c3_mirror.safetensors", "-o", "concept_c3_mirror.safetensors", "--force"],
      ["merge", "linear", "concept_c3_mirror.safetensors", "-o", "concept_c7_rot90.safetensors"],
    ];
    for (const args of commands) {
      const told = await run(page, args, args.includes("-o") ? ["x.safetensors"] : []);
      assert.equal(told.error, nativeError(args), args.join(" "));
      assert.equal(told.outputs, undefined);
    }
    console.log(`  ${commands.length} commands`);
  },

  async "what inspect tells is the command line's"(browser) {
    const page = await program(browser, [mirror, rot90, heart]);
    const names = lend([mirror, rot90, heart]);
    for (const args of [["inspect", names[0]], ["inspect", "--overlap", ...names]]) {
      const told = await run(page, args);
      assert.equal(told.error, undefined);
      assert.equal(told.text, native(args));
    }
  },

  // Each becomes a pipeline, for which a browser compiles it to the end, and is launched on jobs of no size. The merges above
  // tell whether the numbers of those that they launch are right.
  async "every kernel is compiled and launched by the browser"(browser) {
    const page = await program(browser);
    const kernels = await page.evaluate(async () => {
      const program = await import("./loraweld.js");
      await program.default();
      const adapter = await navigator.gpu.requestAdapter();
      const { maxComputeWorkgroupStorageSize, maxStorageBuffersPerShaderStage } = adapter.limits;
      const requiredLimits = { maxComputeWorkgroupStorageSize, maxStorageBuffersPerShaderStage };
      window.device = await adapter.requestDevice({ requiredLimits });
      window.kernels = JSON.parse(program.kernels());
      return window.kernels.map(({ name, source }) => ({ name, source }));
    });
    const failed = [];
    let [compiled, left] = [0, 0];
    for (const [i, { name, source }] of kernels.entries()) {
      // f64 and matrix units are no part of WebGPU; each kernel that takes or serves them has a twin that does without.
      if (/^enable /m.test(source) || name.includes("f64") || /\bsubgroup[A-Z]/.test(source)) {
        left += 1;
        continue;
      }
      const started = performance.now();
      const error = await page.evaluate(async (i) => {
        const { device, kernels } = window;
        const { source, name } = kernels[i];
        device.pushErrorScope("validation");
        const bindings = [...source.matchAll(/@binding\((\d+)\)\s*var<(uniform|storage)(?:, (read_write|read))?>/g)];
        const entries = bindings.map(([, binding, space, access]) => {
          const type = space === "uniform" ? "uniform" : access === "read_write" ? "storage" : "read-only-storage";
          return { binding: Number(binding), visibility: GPUShaderStage.COMPUTE, buffer: { type } };
        });
        const layout = device.createBindGroupLayout({ entries });
        const module = device.createShaderModule({ code: source });
        const pipelineLayout = device.createPipelineLayout({ bindGroupLayouts: [layout] });
        try {
          const compute = { module, entryPoint: "main" };
          const pipeline = await device.createComputePipelineAsync({ label: name, layout: pipelineLayout, compute });
          const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.UNIFORM;
          const buffers = entries.map(() => device.createBuffer({ size: 4096, usage }));
          const bound = entries.map(({ binding }, n) => ({ binding, resource: { buffer: buffers[n] } }));
          const encoder = device.createCommandEncoder();
          const pass = encoder.beginComputePass();
          pass.setPipeline(pipeline);
          pass.setBindGroup(0, device.createBindGroup({ layout, entries: bound }));
          pass.dispatchWorkgroups(1);
          pass.end();
          device.queue.submit([encoder.finish()]);
          await device.queue.onSubmittedWorkDone();
          buffers.forEach((buffer) => buffer.destroy());
          return (await device.popErrorScope())?.message;
        } catch (error) {
          await device.popErrorScope();
          return error.message;
        }
      }, i);
      console.log(`  ${name}: ${error ?? "compiled and launched"}, ${((performance.now() - started) / 1000).toFixed(1)} s`);
      compiled += 1;
      if (error !== undefined) failed.push(`${name}: ${error}`);
    }
    console.log(`  ${compiled} were compiled and launched; ${left} need what WebGPU has not`);
    assert.deepEqual(failed, []);
  },

  async "a device that is lost leaves an error and no file"(browser) {
    const page = await program(browser, [mirror, rot90]);
    const worker = page.workers()[0];
    await worker.evaluate(() => {
      const request = GPUAdapter.prototype.requestDevice;
      GPUAdapter.prototype.requestDevice = async function (...args) {
        const device = await request.apply(this, args);
        let submits = 0;
        const submit = device.queue.submit;
        device.queue.submit = function (...args) {
          submit.apply(this, args);
          submits += 1;
          if (submits === self.losesAfter) device.destroy();
        };
        return device;
      };
    });
    const args = ["merge", "linear", "--dtype", "f32", "concept_c3_mirror.safetensors", "concept_c7_rot90.safetensors", "-o", "out.safetensors", "--force"];
    for (const losesAfter of [1, 2, 3]) {
      await worker.evaluate((n) => (self.losesAfter = n), losesAfter);
      const told = await run(page, [...args, "--device", "gpu"], ["out.safetensors"]);
      console.log(`  after ${losesAfter} submissions: ${told.error}`);
      assert.match(told.error ?? "", /^device: .*: the GPU was lost on the way \(.*\), .*; try again, or compute on the CPU$/);
      assert.equal(told.outputs, undefined);
    }
    // The next one has a device of its own.
    await worker.evaluate(() => (self.losesAfter = undefined));
    const told = await run(page, [...args, "--device", "gpu"], ["out.safetensors"]);
    assert.equal(told.error, undefined);
  },

  async "the page merges what is dropped on it"(browser) {
    const page = await browser.newPage();
    const problems = [];
    page.on("pageerror", (error) => problems.push(String(error)));
    page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
    await page.addInitScript(() => delete window.showSaveFilePicker);
    await page.goto(address);
    await page.locator("#device", { hasText: "Computes on" }).waitFor({ timeout: 60_000 });
    console.log(`  ${await page.locator("#device").textContent()}`);
    await page.setInputFiles("#choose", [gradient, heart]);
    await page.locator("#matched", { hasText: "match: 24 layers in both files" }).waitFor();
    await page.screenshot({ path: join(pictures, "files.png"), fullPage: true });

    await page.click("#overlap");
    await page.locator("#overlaps h2").first().waitFor();
    await page.locator("#overlaps").screenshot({ path: join(pictures, "overlap.png") });

    await page.selectOption("#method", "np-lora");
    await page.selectOption("#on", "cpu");
    const strengths = page.locator(".files input[type=number]");
    await strengths.nth(1).fill("0.8");
    await page.click("#go");
    await page.locator("#result").waitFor();
    await page.locator("#result").screenshot({ path: join(pictures, "result.png") });
    const [download] = await Promise.all([page.waitForEvent("download"), page.click("#save")]);
    const saved = readFileSync(await download.path());
    lend([gradient, heart]);
    const command = await page.locator("#command").textContent();
    console.log(`  ${command}`);
    native([...command.split(" ").slice(1), "--force", "--device", "cpu"]);
    assert.ok(saved.equals(readFileSync(join(folder, "merged.safetensors"))), "the saved file differs");
    assert.deepEqual(problems, []);

    await page.setInputFiles("#choose", [{ name: "broken.safetensors", mimeType: "", buffer: readFileSync(mirror).subarray(0, 999) }]);
    await page.locator(".wrong").waitFor();
    await page.selectOption("#method", "linear");
    await page.fill("#more", "--rank-of 3");
    await page.click("#go");
    await page.locator("#error:not([hidden])").waitFor();
    await page.locator("#error").scrollIntoViewIfNeeded();
    await page.screenshot({ path: join(pictures, "error.png") });
  },

  async "a merge is cancelled, and the next one runs"(browser) {
    const page = await browser.newPage();
    await page.goto(address);
    await page.locator("#device", { hasText: "Computes on" }).waitFor({ timeout: 60_000 });
    const big = join(folder, "big.safetensors");
    writeFileSync(big, makeLora(flux().slice(0, 24), 64, 1));
    await page.setInputFiles("#choose", [big, mirror]);
    await page.locator("#matched", { hasText: "match:" }).waitFor({ timeout: 120_000 });
    await page.getByRole("button", { name: "Remove concept_c3_mirror.safetensors" }).click();
    await page.selectOption("#on", "cpu");
    await page.selectOption("#method", "svd");
    await page.fill("#rank", "4");
    await page.click("#go");
    await page.locator("#stage", { hasText: " of 24" }).waitFor({ timeout: 120_000 });
    await page.screenshot({ path: join(pictures, "running.png"), fullPage: true });
    await page.click("#cancel");
    await page.locator("#said", { hasText: "cancelled" }).waitFor();
    assert.ok(!(await page.locator("#result").isVisible()));
    const left = await page.evaluate(async () => {
      let names = [];
      // The browser closes the files of a worker that was ended when it comes to it.
      for (let i = 0; i < 40; i++) {
        await new Promise((resolve) => setTimeout(resolve, 500));
        names = [];
        const root = await navigator.storage.getDirectory();
        for await (const folder of root.values()) for await (const name of folder.keys()) names.push(name);
        if (names.length === 0) break;
      }
      return names;
    });
    assert.deepEqual(left, []);
    await page.setInputFiles("#choose", [mirror, rot90]);
    await page.locator("#matched", { hasText: "match:" }).waitFor({ timeout: 120_000 });
    await page.getByRole("button", { name: "Remove big.safetensors" }).click();
    await page.selectOption("#method", "linear");
    await page.fill("#rank", "");
    await page.click("#go");
    await page.locator("#result").waitFor({ timeout: 60_000 });
  },

  async "a file of 5 GB is inspected in little memory"(browser) {
    const modules = flux();
    const { head, bytes } = headOf(modules, 640);
    const path = join(folder, "large.safetensors");
    writeFileSync(path, head);
    // All but the header is a hole.
    truncateSync(path, bytes);
    const page = await program(browser);
    await page.setContent('<input type="file">');
    await page.setInputFiles("input", path);
    await page.evaluate(() => window.lendFile("large.safetensors", document.querySelector("input").files[0]));
    const told = await run(page, ["inspect", "large.safetensors"]);
    assert.equal(told.error, undefined);
    assert.equal(told.text, native(["inspect", "large.safetensors"]));
    console.log(`  ${(bytes / 2 ** 30).toFixed(2)} GiB in ${(told.memory / 2 ** 20).toFixed(0)} MiB`);
    assert.ok(bytes > 5e9 && told.memory < 200e6);
  },

  async "two files of FLUX's shape are merged"(browser) {
    // FLUX=LAYERS takes some of them, and methods that take longer.
    const files = [1, 2].map((seed) => join(folder, `flux${seed}.safetensors`));
    // By name, as files are written.
    const modules = flux().slice(0, Number(process.env.FLUX ?? Infinity)).sort(([x], [y]) => (x < y ? -1 : 1));
    files.forEach((path, i) => writeFileSync(path, makeLora(modules, 32, i + 1)));
    const more = process.env.FLUX === undefined ? [] : [["cpu", "np-lora"], ["cpu", "svd", "--rank", "32"]];
    for (const [device, ...method] of [["cpu", "linear"], ...more]) {
      const page = await program(browser);
      await page.setContent('<input type="file" multiple>');
      await page.setInputFiles("input", files);
      await page.evaluate(() => {
        for (const file of document.querySelector("input").files) window.lendFile(file.name, file);
      });
      const names = method[0] === "np-lora" ? ["--style", "flux1.safetensors", "--subject", "flux2.safetensors"] : ["flux1.safetensors", "flux2.safetensors"];
      const args = ["merge", ...method, ...names, "-o", "merged.safetensors", "--force"];
      const started = performance.now();
      const told = await run(page, [...args, "--device", device], ["merged.safetensors"], true);
      const seconds = (performance.now() - started) / 1000;
      assert.equal(told.error, undefined);
      const before = performance.now();
      execFileSync(loraweld, [...args, "--device", "cpu"], { cwd: folder, stdio: "pipe", env: { ...process.env, RAYON_NUM_THREADS: "1" } });
      const own = (performance.now() - before) / 1000;
      const memory = (told.memory / 2 ** 20).toFixed(0);
      console.log(`  ${method.join(" ")} on the ${device}: ${seconds.toFixed(1)} s, ${memory} MiB; native, on one thread of the CPU: ${own.toFixed(1)} s`);
      assert.equal(told.sizes["merged.safetensors"], statSync(join(folder, "merged.safetensors")).size);
      await page.close();
    }
  },

  async "the page works offline once it was loaded"(browser) {
    const context = await browser.newContext();
    const page = await context.newPage();
    await page.goto(address);
    await page.evaluate(() => navigator.serviceWorker.ready.then(() => undefined));
    await context.setOffline(true);
    await page.reload();
    await page.locator("#device", { hasText: "Computes on" }).waitFor({ timeout: 60_000 });
    await page.setInputFiles("#choose", [mirror]);
    await page.locator(".facts", { hasText: "rank 8" }).waitFor();
    await context.close();
  },

  async "a phone's width is enough, in light and dark"(browser) {
    for (const colorScheme of ["light", "dark"]) {
      const context = await browser.newContext({ viewport: { width: 390, height: 844 }, colorScheme });
      const page = await context.newPage();
      await page.goto(address);
      await page.locator("#device", { hasText: "Computes on" }).waitFor({ timeout: 60_000 });
      await page.setInputFiles("#choose", [mirror, rot90]);
      await page.locator("#matched", { hasText: "match:" }).waitFor();
      await page.locator(".blocks summary").first().click();
      await page.screenshot({ path: join(pictures, `phone-${colorScheme}.png`), fullPage: true });
      const over = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
      assert.ok(over <= 0, `the page is ${over} pixels wider than the phone`);
      await context.close();
    }
  },

  async "everything has a name, and the keyboard reaches it"(browser) {
    const page = await browser.newPage();
    await page.goto(address);
    await page.locator("#device", { hasText: "Computes on" }).waitFor({ timeout: 60_000 });
    await page.setInputFiles("#choose", [mirror, rot90]);
    await page.locator("#matched", { hasText: "match:" }).waitFor();
    const unnamed = await page.evaluate(() =>
      [...document.querySelectorAll("input, select, button, progress")]
        .filter((e) => !(e.labels?.length || e.ariaLabel || e.getAttribute("aria-labelledby") || e.textContent.trim()))
        .map((e) => e.outerHTML),
    );
    assert.deepEqual(unnamed, []);
    const reached = new Set();
    for (let i = 0; i < 40; i++) {
      await page.keyboard.press("Tab");
      reached.add(await page.evaluate(() => document.activeElement?.id || document.activeElement?.textContent));
    }
    for (const id of ["choose", "overlap", "method", "calibration", "format", "rank", "dtype", "output", "more", "go"])
      assert.ok(reached.has(id), `the keyboard does not reach #${id}`);
  },
};

// ---- Running them ----

writeFileSync(join(dist, "empty.html"), '<!doctype html><title>tests</title><link rel="icon" href="data:,">');
const server = await serve({ "/": dist, "/fixtures/": folder });
const address = `http://127.0.0.1:${server.address().port}/`;
const wanted = process.argv.slice(2);
const names = Object.keys(tests).filter((name) => wanted.length === 0 || wanted.some((part) => name.includes(part)));
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", ...GPU] });
let failures = 0;
for (const name of names) {
  console.log(name);
  const started = performance.now();
  try {
    const context = await browser.newContext();
    await tests[name](Object.assign(Object.create(browser), { newPage: () => context.newPage(), newContext: (o) => browser.newContext(o) }));
    await context.close();
    console.log(`  ok, ${((performance.now() - started) / 1000).toFixed(1)} s`);
  } catch (error) {
    failures += 1;
    console.log(`  FAILED: ${error.message.split("Browser logs:")[0].trim()}`);
  }
}
await browser.close();
server.close();
rmSync(join(dist, "empty.html"));
rmSync(folder, { recursive: true });
console.log(failures === 0 ? `all ${names.length} passed` : `${failures} of ${names.length} failed`);
process.exit(failures === 0 ? 0 : 1);
