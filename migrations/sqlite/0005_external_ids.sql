-- What a device is called outside, where that is not a UUID: its id is then the UUIDv5 of this text in the namespace of the configuration.

ALTER TABLE devices ADD COLUMN external_id TEXT CHECK (length(external_id) BETWEEN 1 AND 64 AND external_id NOT GLOB '*[^ -~]*');
