CREATE TABLE product (
    sku          TEXT    NOT NULL PRIMARY KEY,
    name         TEXT    NOT NULL,
    description  TEXT    NOT NULL,
    price_minor  INTEGER NOT NULL CHECK (price_minor > 0),
    currency     TEXT    NOT NULL CHECK (length(currency) = 3)
) STRICT;

-- Apart from product: these rows are hot, and small rows make small commits.
CREATE TABLE stock (
    sku        TEXT    NOT NULL PRIMARY KEY REFERENCES product (sku),
    initial    INTEGER NOT NULL CHECK (initial >= 0),
    available  INTEGER NOT NULL CHECK (available >= 0),
    reserved   INTEGER NOT NULL CHECK (reserved >= 0),
    sold       INTEGER NOT NULL CHECK (sold >= 0),
    CHECK (initial = available + reserved + sold)
) STRICT, WITHOUT ROWID;

-- seq is the commit order on SQLite, and so the order of pages; ids only look ordered.
CREATE TABLE orders (
    seq             INTEGER PRIMARY KEY AUTOINCREMENT,
    id              TEXT    NOT NULL UNIQUE,
    principal       TEXT    NOT NULL,
    status          TEXT    NOT NULL,
    version         INTEGER NOT NULL CHECK (version > 0),
    total_minor     INTEGER NOT NULL CHECK (total_minor >= 0),
    refunded_minor  INTEGER NOT NULL CHECK (refunded_minor >= 0 AND refunded_minor <= total_minor),
    currency        TEXT    NOT NULL CHECK (length(currency) = 3),
    created_at_ms   INTEGER NOT NULL,
    expires_at_ms   INTEGER NOT NULL,
    trace_id        TEXT    NOT NULL
) STRICT;
CREATE INDEX orders_by_principal ON orders (principal, seq);
CREATE INDEX orders_by_deadline ON orders (expires_at_ms) WHERE status = 'placed';

CREATE TABLE order_line (
    order_id                  TEXT    NOT NULL REFERENCES orders (id),
    sku                       TEXT    NOT NULL REFERENCES product (sku),
    quantity                  INTEGER NOT NULL CHECK (quantity > 0),
    unit_price_minor          INTEGER NOT NULL CHECK (unit_price_minor > 0),
    total_minor               INTEGER NOT NULL,
    allocated_discount_minor  INTEGER NOT NULL
        CHECK (allocated_discount_minor >= 0 AND allocated_discount_minor <= total_minor),
    currency                  TEXT    NOT NULL CHECK (length(currency) = 3),
    PRIMARY KEY (order_id, sku)
) STRICT, WITHOUT ROWID;

-- The stock ledger: the sums of the three columns of a SKU are its stock.
CREATE TABLE stock_movement (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    sku        TEXT    NOT NULL REFERENCES stock (sku),
    reason     TEXT    NOT NULL,
    order_id   TEXT    REFERENCES orders (id),
    available  INTEGER NOT NULL,
    reserved   INTEGER NOT NULL,
    sold       INTEGER NOT NULL,
    at_ms      INTEGER NOT NULL
) STRICT;

CREATE TABLE idempotency (
    principal     TEXT    NOT NULL,
    route         TEXT    NOT NULL,
    key           TEXT    NOT NULL,
    fingerprint   BLOB    NOT NULL CHECK (length(fingerprint) = 32),
    status        INTEGER NOT NULL,
    content_type  TEXT    NOT NULL,
    location      TEXT,
    etag          TEXT,
    body          BLOB    NOT NULL,
    -- The order this key created; null for every other effect.
    order_id      TEXT    REFERENCES orders (id),
    at_ms         INTEGER NOT NULL,
    PRIMARY KEY (principal, route, key)
) STRICT;
CREATE UNIQUE INDEX idempotency_by_order ON idempotency (order_id) WHERE order_id IS NOT NULL;

-- What happened, in order: the audit trail of every order and the queue of the relays.
CREATE TABLE outbox (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id   TEXT    NOT NULL UNIQUE,
    topic      TEXT    NOT NULL,
    order_id   TEXT    NOT NULL REFERENCES orders (id),
    version    INTEGER NOT NULL,
    principal  TEXT    NOT NULL,
    actor      TEXT    NOT NULL,
    trace_id   TEXT    NOT NULL,
    payload    TEXT    NOT NULL,
    at_ms      INTEGER NOT NULL
) STRICT;
CREATE INDEX outbox_by_order ON outbox (order_id);

-- Who gets the events. SQLite's relay moves the cursor over the outbox; PostgreSQL's relays
-- claim rows of delivery, because its sequences commit out of order.
CREATE TABLE sink (
    id             TEXT    NOT NULL PRIMARY KEY,
    kind           TEXT    NOT NULL,
    -- Only this principal's events; null for all.
    principal      TEXT,
    url            TEXT    NOT NULL,
    secret         TEXT    NOT NULL,
    cursor         INTEGER NOT NULL,
    created_at_ms  INTEGER NOT NULL,
    deleted_at_ms  INTEGER
) STRICT;

CREATE TABLE delivery (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    sink          TEXT    NOT NULL REFERENCES sink (id),
    event_id      TEXT    NOT NULL REFERENCES outbox (event_id),
    leased_until_ms  INTEGER NOT NULL,
    delivered_at_ms  INTEGER,
    UNIQUE (sink, event_id)
) STRICT;
CREATE INDEX delivery_pending ON delivery (sink, seq) WHERE delivered_at_ms IS NULL;

CREATE TABLE dead_letter (
    sink      TEXT    NOT NULL REFERENCES sink (id),
    event_id  TEXT    NOT NULL REFERENCES outbox (event_id),
    attempts  INTEGER NOT NULL,
    reason    TEXT    NOT NULL,
    at_ms     INTEGER NOT NULL,
    PRIMARY KEY (sink, event_id)
) STRICT;

CREATE TABLE payment (
    id              TEXT    NOT NULL PRIMARY KEY,
    order_id        TEXT    NOT NULL REFERENCES orders (id),
    status          TEXT    NOT NULL,
    amount_minor    INTEGER NOT NULL CHECK (amount_minor >= 0),
    captured_minor  INTEGER NOT NULL CHECK (captured_minor >= 0),
    refunded_minor  INTEGER NOT NULL CHECK (refunded_minor >= 0),
    currency        TEXT    NOT NULL CHECK (length(currency) = 3),
    created_at_ms   INTEGER NOT NULL,
    -- When the provider is asked what became of it; null once it is settled.
    check_at_ms     INTEGER
) STRICT;
CREATE INDEX payment_by_order ON payment (order_id);
CREATE INDEX payment_unsettled ON payment (check_at_ms) WHERE check_at_ms IS NOT NULL;

-- What the provider said, once per event id. Amounts are sums of these, never increments.
CREATE TABLE payment_event (
    payment_id    TEXT    NOT NULL REFERENCES payment (id),
    event_id      TEXT    NOT NULL,
    sequence      INTEGER NOT NULL,
    kind          TEXT    NOT NULL,
    amount_minor  INTEGER NOT NULL CHECK (amount_minor >= 0),
    at_ms         INTEGER NOT NULL,
    PRIMARY KEY (payment_id, event_id)
) STRICT;

CREATE TABLE refund (
    id             TEXT    NOT NULL PRIMARY KEY,
    order_id       TEXT    NOT NULL REFERENCES orders (id),
    payment_id     TEXT    NOT NULL REFERENCES payment (id),
    status         TEXT    NOT NULL,
    reason         TEXT    NOT NULL,
    amount_minor   INTEGER NOT NULL CHECK (amount_minor >= 0),
    currency       TEXT    NOT NULL CHECK (length(currency) = 3),
    created_at_ms  INTEGER NOT NULL
) STRICT;
CREATE INDEX refund_by_order ON refund (order_id);

CREATE TABLE refund_line (
    refund_id     TEXT    NOT NULL REFERENCES refund (id),
    order_id      TEXT    NOT NULL,
    sku           TEXT    NOT NULL,
    quantity      INTEGER NOT NULL CHECK (quantity > 0),
    amount_minor  INTEGER NOT NULL CHECK (amount_minor >= 0),
    currency      TEXT    NOT NULL CHECK (length(currency) = 3),
    restocked     INTEGER NOT NULL,
    PRIMARY KEY (refund_id, sku)
) STRICT;
CREATE INDEX refund_line_by_order ON refund_line (order_id);
