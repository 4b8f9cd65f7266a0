// A host of the public internet that speaks HTTP/2 on port 9443: `node played_http2.js ADDRESS CERTIFICATE`.
// Answers each request with the version of HTTP that it came by. Once it listens it prints a JSON line.
const [address, certificate] = process.argv.slice(2);
const pem = require("fs").readFileSync(certificate);
const server = require("http2").createSecureServer({ key: pem, cert: pem, allowHTTP1: true });
server.on("request", (request, response) => response.end(`HTTP ${request.httpVersion} ${request.url}`));
server.listen(9443, address, () => console.log(JSON.stringify({ address })));
