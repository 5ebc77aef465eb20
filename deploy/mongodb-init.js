// The proxy's user, with the rights it needs. A role lives in the database where it is created,
// and the user's grants name that database.
const { readFileSync } = require("fs");

db.getSiblingDB("cgc").createRole({
  role: "apiKeysReader",
  privileges: [{ resource: { db: "cgc", collection: "api_keys" }, actions: ["find"] }],
  roles: [],
});
db.getSiblingDB("billing").createRole({
  role: "completionBillingWriter",
  privileges: [{ resource: { db: "billing", collection: "events_oneoff" }, actions: ["insert"] }],
  roles: [],
});
db.getSiblingDB("llmproxy").createRole({
  role: "limitsWriter",
  privileges: [
    { resource: { db: "llmproxy", collection: "limits" }, actions: ["find", "insert", "update"] },
  ],
  roles: [],
});
db.getSiblingDB("cgc").createUser({
  user: "llmproxy",
  pwd: readFileSync("/run/secrets/mongodb_password", "utf8").trim(),
  roles: [
    { role: "apiKeysReader", db: "cgc" },
    { role: "completionBillingWriter", db: "billing" },
    { role: "limitsWriter", db: "llmproxy" },
  ],
});
