-- The schema of llmproxy's SQLite store. Safe to apply again, and to a database of the earlier
-- llmproxy, which has the tables api_key and event_oneoff.

CREATE TABLE IF NOT EXISTS api_key (
	id TEXT PRIMARY KEY,
	secret TEXT,           -- lower-case hex SHA-256 of the key
	type TEXT,             -- 'LLM'
	expires TEXT,          -- ISO 8601, UTC where no offset is given; NULL: never
	comment TEXT
);
CREATE INDEX IF NOT EXISTS api_key_secret ON api_key(secret);

-- The models that a key may ask for, by name or alias. A key without a row here may ask for all.
CREATE TABLE IF NOT EXISTS key_model (
	api_key TEXT NOT NULL, -- api_key.id
	model TEXT NOT NULL,
	PRIMARY KEY (api_key, model)
) WITHOUT ROWID;

-- Limits of one key, in the place of those in [limits]. NULL: the setting holds. The first three: 0 is
-- no limit. The others are budgets: tokens, or micro-units (1e-6) of the currency; 0 is nothing.
CREATE TABLE IF NOT EXISTS key_limit (
	api_key TEXT PRIMARY KEY, -- api_key.id
	requests_per_minute INTEGER
		CHECK (requests_per_minute IS NULL OR typeof(requests_per_minute) = 'integer'
			AND requests_per_minute BETWEEN 0 AND 1000000),
	concurrent_requests INTEGER
		CHECK (concurrent_requests IS NULL OR typeof(concurrent_requests) = 'integer'
			AND concurrent_requests BETWEEN 0 AND 1000000),
	tokens_per_minute INTEGER
		CHECK (tokens_per_minute IS NULL OR typeof(tokens_per_minute) = 'integer'
			AND tokens_per_minute BETWEEN 0 AND 1000000000),
	tokens_per_day INTEGER
		CHECK (tokens_per_day IS NULL OR typeof(tokens_per_day) = 'integer'
			AND tokens_per_day BETWEEN 0 AND 9000000000000000),
	tokens_per_month INTEGER
		CHECK (tokens_per_month IS NULL OR typeof(tokens_per_month) = 'integer'
			AND tokens_per_month BETWEEN 0 AND 9000000000000000),
	tokens_total INTEGER
		CHECK (tokens_total IS NULL OR typeof(tokens_total) = 'integer'
			AND tokens_total BETWEEN 0 AND 9000000000000000),
	cost_per_day INTEGER
		CHECK (cost_per_day IS NULL OR typeof(cost_per_day) = 'integer'
			AND cost_per_day BETWEEN 0 AND 9000000000000000),
	cost_per_month INTEGER
		CHECK (cost_per_month IS NULL OR typeof(cost_per_month) = 'integer'
			AND cost_per_month BETWEEN 0 AND 9000000000000000),
	cost_total INTEGER
		CHECK (cost_total IS NULL OR typeof(cost_total) = 'integer'
			AND cost_total BETWEEN 0 AND 9000000000000000)
) WITHOUT ROWID;

-- What the processes on this file share of a key's limits: one row for each key that has any.
CREATE TABLE IF NOT EXISTS key_share (
	api_key TEXT PRIMARY KEY,       -- api_key.id
	requests_full_at REAL NOT NULL, -- Unix time in s, at which all requests of a minute are there again
	tokens_full_at REAL NOT NULL,
	claims TEXT NOT NULL            -- JSON: by process, how many requests in flight, and until when that counts
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS event_oneoff (
	id INTEGER PRIMARY KEY,
	created TEXT,          -- when the request finished, UTC
	api_key TEXT,          -- api_key.id
	product TEXT,          -- MODEL/DEVICE/TYPE
	quantity INTEGER,      -- tokens, or seconds of audio
	rid TEXT               -- the request's id
);
CREATE UNIQUE INDEX IF NOT EXISTS event_oneoff_identity ON event_oneoff(rid, product);

-- One row per request that was sent to a backend.
CREATE TABLE IF NOT EXISTS ledger (
	rid TEXT PRIMARY KEY,
	state TEXT NOT NULL,   -- open, settled, estimated, disputed, orphan
	owner TEXT NOT NULL,   -- the process that opened it
	opened TEXT NOT NULL,
	finished TEXT,
	api_key TEXT NOT NULL,
	user_id TEXT,
	path TEXT NOT NULL,
	model TEXT NOT NULL,
	device TEXT NOT NULL,
	outcome TEXT,          -- complete, truncated, stalled, client_gone, out_of_budget, refused, backend_failed; NULL after a crash
	status INTEGER,        -- the backend's HTTP status
	prompt INTEGER,
	completion INTEGER,
	embedding INTEGER,
	transcription INTEGER,
	raw TEXT,              -- a usage report that could not be used
	delivered INTEGER NOT NULL DEFAULT 0,
	price INTEGER,         -- price.id, of the price that applied; NULL: none was set
	held_tokens INTEGER,   -- what it could take at most when it was opened; NULL: its key has no budget
	held_cost INTEGER      -- the same in micro-units (1e-6) of the currency
) WITHOUT ROWID;
-- Who was asked for a row, where a model has several servers. The row has how the last one ended.
CREATE TABLE IF NOT EXISTS attempt (
	rid TEXT NOT NULL,
	number INTEGER NOT NULL, -- 1 is the first
	ended TEXT NOT NULL,
	server TEXT NOT NULL,    -- its URL
	outcome TEXT NOT NULL,
	status INTEGER,
	PRIMARY KEY (rid, number)
) WITHOUT ROWID;

-- What a million of each kind cost, in micro-units (1e-6) of the currency. Rows are never changed.
CREATE TABLE IF NOT EXISTS price (
	id INTEGER PRIMARY KEY, -- made from the other columns
	currency TEXT NOT NULL, -- ISO 4217
	prompt INTEGER NOT NULL,
	completion INTEGER NOT NULL,
	embedding INTEGER NOT NULL,
	transcription INTEGER NOT NULL
);

-- The file itself, as other proxies know it: one row, made when a proxy opens the file.
CREATE TABLE IF NOT EXISTS journal (
	id TEXT NOT NULL,         -- 16 hex digits
	readings INTEGER NOT NULL -- how often was read what a key has used
);

-- What was billed, in sums: kept by a trigger on the ledger, which is made when a proxy or
-- llmproxyctl opens the file.
CREATE TABLE IF NOT EXISTS usage_day (
	day TEXT NOT NULL,      -- YYYY-MM-DD, UTC: when the requests finished
	api_key TEXT NOT NULL,  -- api_key.id
	model TEXT NOT NULL,
	price INTEGER NOT NULL, -- price.id; 0: none was set
	requests INTEGER NOT NULL,
	prompt INTEGER NOT NULL,
	completion INTEGER NOT NULL,
	embedding INTEGER NOT NULL,
	transcription INTEGER NOT NULL,
	PRIMARY KEY (day, api_key, model, price)
) WITHOUT ROWID;
-- What a key has used in all is read here.
CREATE INDEX IF NOT EXISTS usage_key ON usage_day(api_key, day);
CREATE INDEX IF NOT EXISTS ledger_unsettled ON ledger(state) WHERE state <> 'settled';
CREATE INDEX IF NOT EXISTS ledger_undelivered ON ledger(finished, rid)
	WHERE delivered = 0 AND state IN ('settled', 'estimated');
