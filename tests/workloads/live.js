// An HTTP server whose clients stay: by keep-alive, and by connections that were upgraded to another protocol.
"use strict";
const http = require("http");
const fs = require("fs");

const [, , portFile] = process.argv;
const live = new Set();
let requests = 0;
const server = http.createServer((request, response) => response.end(`${++requests} ${live.size}`));
server.keepAliveTimeout = 600000;
server.on("upgrade", (request, socket) => {
  let count = 0;
  let text = "";
  live.add(socket);
  socket.on("close", () => live.delete(socket));
  socket.on("data", (data) => {
    const lines = (text + data).split("\n");
    text = lines.pop();
    for (const line of lines) socket.write(`${++count} ${line}\n`);
  });
  socket.write("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: lines\r\n\r\n");
});
server.listen(0, "127.0.0.1", () => {
  fs.writeFileSync(`${portFile}.new`, `${server.address().port}`);
  fs.renameSync(`${portFile}.new`, portFile);
});
