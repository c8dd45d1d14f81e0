-- What a device is called outside, where that is not a UUID: its id is then the UUIDv5 of this text in the namespace of the configuration.

ALTER TABLE devices ADD COLUMN external_id TEXT;
-- Not validated: no row has one yet, and to read them all would hold up look-ups.
ALTER TABLE devices ADD CONSTRAINT devices_external_id_check CHECK (external_id ~ '^[ -~]{1,64}$') NOT VALID;
