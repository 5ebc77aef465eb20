// Sample keys for trying things out; never load them where others can reach the proxy.
// mongosh "mongodb://USER@HOST/cgc?authSource=admin" sample.js
// Each hash is the SHA-256 of the key: printf %s token1 | sha256sum. Loading them again changes nothing.

const keys = db.getSiblingDB("cgc").getCollection("api_keys");

// token1, expired
keys.updateOne(
  { secret: "df3e6b0bb66ceaadca4f84cbc371fd66e04d20fe51fc414da8d1b84d31d178de" },
  { $setOnInsert: { user_id: "sample", access_level: "LLM", date_expiry: new Date("2024-01-01T00:00:00Z"), comment: "token1, expired" } },
  { upsert: true },
);

// token2, without end
keys.updateOne(
  { secret: "d8cc7aed3851ac3338fcc15df3b6807b89125837f77a75b9ecb13ed2afe3b49f" },
  { $setOnInsert: { user_id: "sample", access_level: "LLM", date_expiry: null, comment: "token2, without end" } },
  { upsert: true },
);

// token3, valid for long
keys.updateOne(
  { secret: "5d6b091416885eaa91283321b69dc526fc42c97783e4cdfdff7a945e3be1f9ef" },
  { $setOnInsert: { user_id: "sample", access_level: "LLM", date_expiry: new Date("2124-01-01T00:00:00Z"), comment: "token3, valid for long" } },
  { upsert: true },
);
