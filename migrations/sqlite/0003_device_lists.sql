-- Lists of devices by state, and by tenant and model, read no more rows than they show.

CREATE INDEX devices_not_enabled ON devices (state, id) WHERE state <> 0;
CREATE INDEX devices_by_tenant_and_model ON devices (tenant, model, id);
