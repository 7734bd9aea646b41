-- Members, groups, campaigns.

CREATE TABLE member (
    id             TEXT    NOT NULL PRIMARY KEY,
    email          TEXT    NOT NULL UNIQUE,
    password_hash  TEXT    NOT NULL,
    -- The last period paid and when it ends; 0 before the first.
    period         INTEGER NOT NULL CHECK (period >= 0),
    paid_until_ms  INTEGER NOT NULL,
    created_at_ms  INTEGER NOT NULL
) STRICT;

-- One row for each period of a subscription, whoever asked for it how often.
CREATE TABLE renewal (
    member_id      TEXT    NOT NULL REFERENCES member (id),
    period         INTEGER NOT NULL CHECK (period > 0),
    paid_until_ms  INTEGER NOT NULL,
    at_ms          INTEGER NOT NULL,
    PRIMARY KEY (member_id, period)
) STRICT;

-- All refresh tokens that came from one login.
CREATE TABLE refresh_family (
    id             TEXT    NOT NULL PRIMARY KEY,
    member_id      TEXT    NOT NULL REFERENCES member (id),
    created_at_ms  INTEGER NOT NULL,
    revoked_at_ms  INTEGER
) STRICT;

CREATE TABLE refresh_token (
    hash           BLOB    NOT NULL PRIMARY KEY CHECK (length(hash) = 32),
    family_id      TEXT    NOT NULL REFERENCES refresh_family (id),
    expires_at_ms  INTEGER NOT NULL,
    used_at_ms     INTEGER
) STRICT;

CREATE TABLE signing_key (
    id             TEXT    NOT NULL PRIMARY KEY,
    seed           BLOB    NOT NULL CHECK (length(seed) = 32),
    created_at_ms  INTEGER NOT NULL
) STRICT;

CREATE TABLE buying_group (
    id                TEXT    NOT NULL PRIMARY KEY,
    sku               TEXT    NOT NULL REFERENCES product (sku),
    size              INTEGER NOT NULL,
    unit_price_minor  INTEGER NOT NULL CHECK (unit_price_minor > 0),
    currency          TEXT    NOT NULL CHECK (length(currency) = 3),
    state             TEXT    NOT NULL,
    taken             INTEGER NOT NULL CHECK (taken >= 0 AND taken <= size),
    paid              INTEGER NOT NULL CHECK (paid >= 0 AND paid <= taken),
    version           INTEGER NOT NULL,
    opened_at_ms      INTEGER NOT NULL,
    deadline_ms       INTEGER NOT NULL
) STRICT;
CREATE INDEX buying_group_open ON buying_group (sku, size, deadline_ms) WHERE state = 'forming';
CREATE INDEX buying_group_deadline ON buying_group (deadline_ms) WHERE state = 'forming';

CREATE TABLE group_place (
    group_id   TEXT    NOT NULL REFERENCES buying_group (id),
    principal  TEXT    NOT NULL,
    order_id   TEXT    NOT NULL UNIQUE REFERENCES orders (id),
    state      TEXT    NOT NULL,
    PRIMARY KEY (group_id, principal)
) STRICT;

-- Admission to a WebSocket, used once.
CREATE TABLE watch_ticket (
    hash           BLOB    NOT NULL PRIMARY KEY CHECK (length(hash) = 32),
    group_id       TEXT    NOT NULL REFERENCES buying_group (id),
    expires_at_ms  INTEGER NOT NULL
) STRICT;

CREATE TABLE campaign_revision (
    number    INTEGER NOT NULL PRIMARY KEY,
    digest    BLOB    NOT NULL CHECK (length(digest) = 32),
    body      TEXT    NOT NULL,
    standing  TEXT    NOT NULL,
    reason    TEXT    NOT NULL,
    at_ms     INTEGER NOT NULL
) STRICT;

-- One row: the pointer that a rollback moves.
CREATE TABLE campaign_active (
    id      INTEGER NOT NULL PRIMARY KEY CHECK (id = 1),
    number  INTEGER NOT NULL
) STRICT;

-- A run is an experiment under one salt; a decision ends it.
CREATE TABLE experiment_run (
    name           TEXT    NOT NULL,
    salt           TEXT    NOT NULL,
    started_at_ms  INTEGER NOT NULL,
    verdict        TEXT    NOT NULL,
    variant        TEXT,
    decided_at_ms  INTEGER,
    PRIMARY KEY (name, salt)
) STRICT;

CREATE TABLE exposure (
    name     TEXT    NOT NULL,
    salt     TEXT    NOT NULL,
    unit     TEXT    NOT NULL,
    variant  TEXT    NOT NULL,
    at_ms    INTEGER NOT NULL,
    PRIMARY KEY (name, salt, unit)
) STRICT;

CREATE TABLE outcome (
    order_id     TEXT    NOT NULL PRIMARY KEY,
    unit         TEXT    NOT NULL,
    total_minor  INTEGER NOT NULL,
    at_ms        INTEGER NOT NULL
) STRICT;
CREATE INDEX outcome_by_unit ON outcome (unit, at_ms);
