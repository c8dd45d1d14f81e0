-- Lists of devices by state, and by tenant and model, read no more rows than they show.

DROP INDEX CONCURRENTLY IF EXISTS devices_not_enabled;
CREATE INDEX CONCURRENTLY devices_not_enabled ON devices (state, id) WHERE state <> 0;

DROP INDEX CONCURRENTLY IF EXISTS devices_by_tenant_and_model;
CREATE INDEX CONCURRENTLY devices_by_tenant_and_model ON devices (tenant, model, id);
