-- Sample keys for trying things out; never load them where others can reach the proxy.
-- sqlite3 db.sqlite < llmproxy/schema.sql && sqlite3 db.sqlite < sample.sql
-- Each hash is the SHA-256 of the key: printf %s token1 | sha256sum

INSERT OR IGNORE INTO api_key (id, secret, type, expires, comment) VALUES
	('6f0d7a52-3c1e-4b7e-9a54-1d2f0c9e8b01',
	 'df3e6b0bb66ceaadca4f84cbc371fd66e04d20fe51fc414da8d1b84d31d178de', 'LLM', datetime('now'), 'token1, expired'),
	('6f0d7a52-3c1e-4b7e-9a54-1d2f0c9e8b02',
	 'd8cc7aed3851ac3338fcc15df3b6807b89125837f77a75b9ecb13ed2afe3b49f', 'LLM', NULL, 'token2, without end'),
	('6f0d7a52-3c1e-4b7e-9a54-1d2f0c9e8b03',
	 '5d6b091416885eaa91283321b69dc526fc42c97783e4cdfdff7a945e3be1f9ef', 'LLM', '2124-01-01', 'token3, valid for long');
