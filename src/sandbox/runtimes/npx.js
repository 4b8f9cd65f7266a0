#!/opt/node/bin/node
// Like npx, but runs the packages pinned in /opt/npm from that directory, in this process and without a registry.
const { existsSync, readFileSync } = require("node:fs");
const { join } = require("node:path");

const packages = "/opt/npm";
const read = (path) => (existsSync(path) ? JSON.parse(readFileSync(path, "utf8")) : {});

const words = process.argv.slice(2);
const index = words.findIndex((word) => word !== "-y" && word !== "--yes");
const [, name, version] = /^(@?[^@]+)(?:@(.+))?$/.exec(words[index] ?? "") ?? [];
const pinned = read(join(packages, "package.json")).dependencies ?? {};
const isPinned = Object.hasOwn(pinned, name) && (version === undefined || version === pinned[name]);

if (isPinned && !existsSync(join("node_modules", name))) {
  const directory = join(packages, "node_modules", name);
  const [program] = Object.values(read(join(directory, "package.json")).bin);
  process.argv = [process.execPath, join(directory, program), ...words.slice(index + 1)];
  require("node:module").runMain();
} else {
  require("/opt/node/lib/node_modules/npm/bin/npx-cli.js");
}
