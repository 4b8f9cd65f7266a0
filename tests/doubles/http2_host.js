// A fake public host with HTTP/2 on port 9443: `node http2_host.js ADDRESS CERTIFICATE`.
// Responds with the HTTP version and path of each request. Prints a JSON line once it listens.
const [address, certificate] = process.argv.slice(2);
const pem = require("fs").readFileSync(certificate);
const server = require("http2").createSecureServer({ key: pem, cert: pem, allowHTTP1: true });
server.on("request", (request, response) => response.end(`HTTP ${request.httpVersion} ${request.url}`));
server.listen(9443, address, () => console.log(JSON.stringify({ address })));
