// Timers, an HTTP server, a child process and a worker thread, as programs for node have them.
"use strict";
const http = require("http");
const fs = require("fs");
const { spawn } = require("child_process");
const { Worker } = require("worker_threads");

const [, , portFile] = process.argv;
let ticks = 0;
setInterval(() => ticks++, 10);

const child = spawn("cat", [], { stdio: ["pipe", "pipe", "inherit"] });
const waiting = [];
child.stdout.on("data", (data) => waiting.shift()(data.toString()));

const worker = new Worker(
  "const { parentPort } = require('worker_threads'); parentPort.on('message', (n) => parentPort.postMessage(n * n));",
  { eval: true },
);
const squares = [];
worker.on("message", (square) => squares.shift()(square));

let requests = 0;
const server = http.createServer(async (request, response) => {
  requests++;
  const echo = await new Promise((resolve) => (waiting.push(resolve), child.stdin.write(`echo ${requests}`)));
  const square = await new Promise((resolve) => (squares.push(resolve), worker.postMessage(requests)));
  response.setHeader("Connection", "close");
  response.end(JSON.stringify({ requests, echo, square, ticks }));
});
server.listen(0, "127.0.0.1", () => {
  fs.writeFileSync(`${portFile}.new`, `${server.address().port}`);
  fs.renameSync(`${portFile}.new`, portFile);
});
