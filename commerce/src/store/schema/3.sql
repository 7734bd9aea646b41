-- What is kept for a time only, and what a period of membership was paid with.

-- Rows with an older time may be gone; so many of them are.
CREATE TABLE retention (
    subject    TEXT    NOT NULL PRIMARY KEY,
    before_ms  INTEGER NOT NULL,
    removed    INTEGER NOT NULL
) STRICT;

-- SQLite finds the oldest keys by row number.
-- PostgreSQL: CREATE INDEX idempotency_by_age ON idempotency (at_ms);

-- The paid order that bought the period; an order buys one.
ALTER TABLE renewal ADD COLUMN order_id TEXT REFERENCES orders (id);
CREATE UNIQUE INDEX renewal_by_order ON renewal (order_id);
