//! All metrics of the gateway: names, help texts and closed sets of labels. No other module names a metric.
//!
//! Each gateway has its own recorder, because tests run several gateways in one process. Handles are created once,
//! here, so that counting on the connect path is one atomic addition. [`crate::fleet::cohorts`] renders the series by
//! cohort, because their labels change at run time.

pub mod process;
mod series;

use metrics::{Counter, Gauge, Histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use seawall_proto::{
    admission::{BreakerState, LimitReason},
    close::EndReason,
    config_source::Outcome,
    connect::ResumeOutcome,
    refusal::{Code, Limit},
    resume::Finding,
    rollout::Verdict,
    session,
    webhook::Delivery,
};

use crate::{
    fleet::{alarms, faults::Fault},
    metrics::series::{Definition, Family, GaugeFamily, HistogramFamily, Names},
    store::{Operation, PresenceState},
};

/// Upper bounds, in seconds, of the time that a device waits: from a local cache hit to the maximum time of an answer.
const WAIT_BUCKETS_SECONDS: [f64; 14] = [
    0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0,
];
/// Upper bounds, in seconds, of hints: from the shortest slot to the longest hint for a blocked device.
const HINT_BUCKETS_SECONDS: [f64; 12] = [
    0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1_800.0, 3_600.0,
];

/// Upper bounds, in seconds, of session lengths: from a connection that breaks at once to the maximum age.
const SESSION_BUCKETS_SECONDS: [f64; 11] = [
    1.0, 10.0, 60.0, 300.0, 900.0, 3_600.0, 10_800.0, 28_800.0, 64_800.0, 86_400.0, 108_000.0,
];

/// Handles of all metrics with a fixed label set. [`Metrics::new`] has their help texts.
pub struct Metrics {
    handle: PrometheusHandle,
    catalog: Vec<Definition>,
    pub sessions: Gauge,
    pub restricted_sessions: GaugeFamily,
    pub listening: Gauge,
    pub ready: Gauge,
    pub draining: Gauge,
    pub database_up: Gauge,
    pub breaker: GaugeFamily,
    pub connections: Family,
    pub handshakes: Family,
    pub throttled: Family,
    pub handshake_duration_seconds: Histogram,
    pub lookups: Family,
    pub lookup_duration_seconds: Histogram,
    pub lookup_statements: Counter,
    pub resumes: Family,
    pub resume_tokens: Family,
    pub resume_revalidations: Family,
    pub revoked_devices: Gauge,
    pub revocations_age_seconds: Gauge,
    pub registry_index_devices: Gauge,
    pub registry_index_age_seconds: Gauge,
    pub lookups_in_flight: Gauge,
    pub admission_limit: Gauge,
    pub admission_limit_reason: GaugeFamily,
    pub admission_elasticity: Gauge,
    pub admission_capacity: GaugeFamily,
    pub admission_ceiling_alarm: Gauge,
    pub admission_queue: Gauge,
    pub retry_hint_seconds: HistogramFamily<1>,
    pub closes: Family,
    pub session_duration_seconds: Histogram,
    pub session_bytes: Family,
    pub api_request_duration_seconds: HistogramFamily<2>,
    pub rules_revision: Gauge,
    pub rules_unsupported: Gauge,
    pub rules_lost: Gauge,
    pub rules_local: Gauge,
    pub rollout_steps: Family,
    pub rules_age_seconds: Gauge,
    pub presence_devices: GaugeFamily,
    pub presence_queue: Gauge,
    pub messages_in: Family,
    pub messages_out: Family,
    pub audit_records: Family,
    pub event_loop_lag_seconds: Histogram,
    pub heartbeat_lag_seconds: Histogram,
    pub observer_lag_seconds: Gauge,
    pub local_health: Gauge,
    pub silent_sessions: GaugeFamily,
    pub silence_checks: Family,
    pub presence_groups_held: Gauge,
    pub presence_changes: Family,
    pub handshakes_under_way: GaugeFamily,
    pub accept_pauses: Counter,
    pub proposals: GaugeFamily,
    pub versions_tested: GaugeFamily,
    pub version_refusals: Counter,
    pub lookup_cohorts_apart: Gauge,
    pub plan_alarm: Gauge,
    pub database_errors: Family,
    pub faults: GaugeFamily,
    pub alarm_active: GaugeFamily,
    pub replacements: Counter,
    pub duplicate_ids: Gauge,
    pub dropped: Family,
    pub webhook_deliveries: Family,
    pub webhook_waiting: Gauge,
    pub slots_stateless: Counter,
    pub task_panics: Counter,
    pub memory_bytes: GaugeFamily,
    pub memory_alarm: Gauge,
    pub memory_refusals: Counter,
    pub config_fetches: Family,
    pub config_age_seconds: Gauge,
    pub tls_reloads: Family,
    pub tls_certificate_seconds: GaugeFamily,
    pub tls_revocation_list_seconds: Gauge,
}

/// Outcome of a TCP connection that was not a request. Label `outcome` of `seawall_connections_total`.
pub const CONNECTION_OUTCOMES: [&str; 8] = [
    "request",
    "probe",
    "silent",
    "address_limited",
    "accept_error",
    "tls_failed",
    "plain_http",
    "proxy_failed",
];
/// Label `limit` of `seawall_retry_hint_seconds` if no [`Limit`] refused.
pub const NO_LIMIT: &str = "none";
/// Label `listener` of `seawall_tls_certificate_expires_seconds`.
pub const TLS_LISTENERS: [&str; 2] = ["devices", "ops"];
/// Label `outcome` of `seawall_lookups_total`.
pub const LOOKUP_OUTCOMES: [&str; 5] = ["found", "not_found", "cached", "failed", "timed_out"];
/// Label `measure` of `seawall_admission_capacity_keys_per_second`.
pub const CAPACITY_MEASURES: [&str; 4] = ["measured", "peak", "last_known_good", "reference"];
/// Label `outcome` of `seawall_messages_total` for messages from devices.
pub const MESSAGE_IN_OUTCOMES: [&str; 4] = ["accepted", "buffer_full", "bad_frame", "rate_limited"];
/// Label `outcome` of `seawall_audit_records_total`.
pub const AUDIT_OUTCOMES: [&str; 4] = ["stored", "kept", "lost", "unrecorded"];
/// Label `outcome` of `seawall_messages_total` for messages to devices.
pub const MESSAGE_OUT_OUTCOMES: [&str; 5] = ["acked", "sent", "device_offline", "mailbox_full", "refused"];
/// Label `occasion` of `seawall_resume_tokens_total`.
pub const TOKEN_OCCASIONS: [&str; 3] = ["welcome", "renewal", "drain"];
/// Label `call` of `seawall_api_request_duration_seconds`.
pub const API_CALLS: [&str; 4] = ["read", "change", "import", "public"];
/// Label `status` of `seawall_api_request_duration_seconds`.
pub const API_STATUSES: [&str; 3] = ["success", "client_error", "server_error"];
/// Label `state` of `seawall_silent_sessions`.
pub const SILENT_STATES: [&str; 3] = ["silent", "suspect", "held"];
/// Label `state` of `seawall_presence_changes_total`.
pub const PRESENCE_STATES: [&str; 3] = ["online", "offline", "unknown"];
/// Label `buffer` of `seawall_dropped_total`.
pub const BUFFERS: [&str; 3] = ["events", "log", "presence"];

impl Metrics {
    /// Creates all series with value zero, so that rates exist from the first scrape.
    ///
    /// # Panics
    /// Never: the bucket lists are constants and not empty.
    #[must_use]
    pub fn new() -> Self {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(
                Matcher::Full("seawall_retry_hint_seconds".into()),
                &HINT_BUCKETS_SECONDS,
            )
            .and_then(|builder| {
                builder.set_buckets_for_metric(
                    Matcher::Full("seawall_session_duration_seconds".into()),
                    &SESSION_BUCKETS_SECONDS,
                )
            })
            .and_then(|builder| builder.set_buckets(&WAIT_BUCKETS_SECONDS))
            .expect("bucket lists are constant and not empty")
            .build_recorder();
        let names = Names::of(&recorder);
        let mut handshake_outcomes = vec!["admitted", "restricted", "abandoned"];
        handshake_outcomes.extend(Code::ALL.iter().map(|code| code.as_str()));

        let mut hint_limits = Limit::ALL.map(Limit::as_str).to_vec();
        hint_limits.push(NO_LIMIT);
        let mut revalidation_outcomes = Finding::ALL.map(Finding::as_str).to_vec();
        revalidation_outcomes.extend(["failed", "dropped"]);

        let mut metrics = Self {
            handle: recorder.handle(),
            catalog: Vec::new(),
            sessions: names.gauge("seawall_sessions", "Live WebSocket sessions."),
            restricted_sessions: names.gauges(
                "seawall_restricted_sessions",
                "Open sessions of devices that a rule restricts, and their maximum: 1 % of the connections, at least 4. Beyond it they are refused with `firmware_blocked`.",
                "kind",
                &["open", "max"],
            ),
            listening: names.gauge(
                "seawall_listening",
                "1 while devices can connect; 0 while a full gateway has stopped listening, so that others on its address are used.",
            ),
            ready: names.gauge("seawall_ready", "1 while /readyz answers 200: new devices should be sent here."),
            draining: names.gauge("seawall_draining", "1 while this node drains, or has drained."),
            database_up: names.gauge(
                "seawall_database_up",
                "1 while the database answers; 0 before the first contact and while it is unavailable.",
            ),
            breaker: names.gauges(
                "seawall_admission_breaker",
                "State of the breaker in front of the database: 1 for the current state, 0 for the others. Devices are looked up only while it is `closed`.",
                "state",
                &BreakerState::ALL.map(BreakerState::as_str),
            ),
            connections: names.family(
                "seawall_connections_total",
                "Accepted TCP connections by outcome. `request`: counted in seawall_handshakes_total. `probe`: a request for /readyz. `silent` and `address_limited`: nothing was sent. `tls_failed`: no TLS handshake, or not in time. `plain_http`: no TLS on a TLS port. `proxy_failed`: no PROXY header from a trusted address.",
                &[],
                "outcome",
                &CONNECTION_OUTCOMES,
            ),
            handshakes: names.family(
                "seawall_handshakes_total",
                "Connect attempts by outcome. The sum is every attempt.",
                &[],
                "outcome",
                &handshake_outcomes,
            ),
            throttled: names.family(
                "seawall_throttled_total",
                "Connections refused with `throttled`, by limit. Two kinds are not connect attempts: silent ones, and those ended in a TLS handshake or a PROXY header, which get no answer and no hint.",
                &[],
                "limit",
                &Limit::ALL.map(Limit::as_str),
            ),
            handshake_duration_seconds: names.histogram(
                "seawall_handshake_duration_seconds",
                "Time from accept to the answer of a connect attempt.",
            ),
            lookups: names.family(
                "seawall_lookups_total",
                "Lookups in the registry by outcome, one per device.",
                &[],
                "outcome",
                &LOOKUP_OUTCOMES,
            ),
            lookup_duration_seconds: names.histogram(
                "seawall_lookup_duration_seconds",
                "Duration of a lookup statement, from sent to answered.",
            ),
            lookup_statements: names.counter(
                "seawall_lookup_statements_total",
                "Lookup statements sent to the database, each with up to 256 keys. Probes of an unavailable database are not included.",
            ),
            resumes: names.family(
                "seawall_resumes_total",
                "Resume tokens shown, by outcome. `resumed` and `graced` admitted their devices without a lookup, `blocked` met a rule, the others were ignored.",
                &[],
                "outcome",
                &ResumeOutcome::ALL.map(ResumeOutcome::as_str),
            ),
            resume_tokens: names.family(
                "seawall_resume_tokens_total",
                "Resume tokens issued to devices.",
                &[],
                "occasion",
                &TOKEN_OCCASIONS,
            ),
            resume_revalidations: names.family(
                "seawall_resume_drills_total",
                "Revalidations by outcome: devices admitted by a resume token that were looked up afterwards, one in 100. `failed`: the database did not answer. `dropped`: too many waited. Their statements are in no other metric.",
                &[],
                "outcome",
                &revalidation_outcomes,
            ),
            revoked_devices: names.gauge(
                "seawall_revoked_devices",
                "Devices whose older resume tokens are not valid, of at most 65,536 that are remembered.",
            ),
            revocations_age_seconds: names.gauge(
                "seawall_revocations_age_seconds",
                "Time since the database last confirmed the revocations of resume tokens.",
            ),
            registry_index_devices: names.gauge(
                "seawall_roster_devices",
                "Registered devices in this node's registry index, which recognises unknown ids; at most 16,000,000, 8 bytes each.",
            ),
            registry_index_age_seconds: names.gauge(
                "seawall_roster_age_seconds",
                "Age of the registry index, over restarts as well; since the start if there is none.",
            ),
            lookups_in_flight: names.gauge(
                "seawall_lookups_in_flight",
                "Distinct keys sent to the database and not answered. Never above seawall_admission_limit.",
            ),
            admission_limit: names.gauge("seawall_admission_limit", "The most keys that may be in flight now."),
            admission_limit_reason: names.gauges(
                "seawall_admission_limit_reason",
                "Why the limit has its value: 1 for the current reason, 0 for the others.",
                "reason",
                &LimitReason::ALL.map(LimitReason::as_str),
            ),
            admission_elasticity: names.gauge(
                "seawall_admission_elasticity",
                "How much throughput rises in percent for 1 % more concurrency: about 1 below the database's capacity, 0 at it, negative beyond it.",
            ),
            admission_capacity: names.gauges(
                "seawall_admission_capacity_keys_per_second",
                "Capacity of the database. `measured`: the last rate while devices waited. `peak`: the best of ten minutes. `last_known_good`: the rate known from before. `reference`: the rate at which slots are issued.",
                "measure",
                &CAPACITY_MEASURES,
            ),
            admission_ceiling_alarm: names.gauge(
                "seawall_admission_ceiling_alarm",
                "1 while devices wait because admission.keys_in_flight_max is too low.",
            ),
            admission_queue: names.gauge("seawall_admission_queue", "Devices that wait for a lookup."),
            retry_hint_seconds: names.histograms(
                "seawall_retry_hint_seconds",
                "Hints to refused devices by limit, silent ones included. `none`: refused for another reason than `throttled`.",
                [("limit", &hint_limits)],
            ),
            closes: names.family(
                "seawall_closes_total",
                "Sessions ended, by reason.",
                &[],
                "reason",
                &EndReason::ALL.map(EndReason::as_str),
            ),
            session_duration_seconds: names.histogram(
                "seawall_session_duration_seconds",
                "Length of the sessions that ended.",
            ),
            session_bytes: names.family(
                "seawall_session_bytes_total",
                "Payload bytes of the text and binary frames that devices sent (`in`) and were sent (`out`, without each session's first frame).",
                &[],
                "direction",
                &["in", "out"],
            ),
            api_request_duration_seconds: names.histograms(
                "seawall_api_request_duration_seconds",
                "Time from the head of a request on the ops listener to the head of its answer. `read` and `change` are calls below `/api/v1`, `import` is the import of devices, `public` is everything else, such as `/metrics` and `/readyz`.",
                [("call", &API_CALLS), ("status", &API_STATUSES)],
            ),
            rules_revision: names.gauge("seawall_rules_revision", "Revision of the rules in force on this node."),
            rules_unsupported: names.gauge(
                "seawall_rules_unsupported",
                "Stored rules that this version of the gateway cannot enforce: they refuse nobody.",
            ),
            rules_lost: names.gauge(
                "seawall_rules_lost",
                "Rules in force on this node that the database has lost.",
            ),
            rules_local: names.gauge(
                "seawall_rules_local",
                "Changes of rules that wait in this node's journal for the database: they are in force on this node only.",
            ),
            rollout_steps: names.family(
                "seawall_rollout_steps_total",
                "Steps of staged changes of rules that this node took on evidence, by verdict.",
                &[],
                "verdict",
                &Verdict::ALL.map(Verdict::as_str),
            ),
            rules_age_seconds: names.gauge(
                "seawall_rules_age_seconds",
                "Time since the database last confirmed the rules in force.",
            ),
            presence_devices: names.gauges(
                "seawall_presence_devices",
                "Devices that this node has seen, by presence.",
                "state",
                &PresenceState::ALL.map(PresenceState::as_str),
            ),
            presence_queue: names.gauge(
                "seawall_presence_queue",
                "Changes of presence that wait to be written to the database. At 200,000 further ones are dropped (`seawall_dropped_total`); the newest state of each device is kept.",
            ),
            messages_in: names.family(
                "seawall_messages_total",
                "Messages between operators and devices.",
                &[("direction", "in")],
                "outcome",
                &MESSAGE_IN_OUTCOMES,
            ),
            messages_out: names.family(
                "seawall_messages_total",
                "Messages between operators and devices.",
                &[("direction", "out")],
                "outcome",
                &MESSAGE_OUT_OUTCOMES,
            ),
            audit_records: names.family(
                "seawall_audit_records_total",
                "Audit records of changes that are not in the database: drains, disconnects, messages. `kept`: on this \
                 node's disk until the database takes it. `lost`: neither could take it; it is in the log. \
                 `unrecorded`: a message beyond the burst.",
                &[],
                "outcome",
                &AUDIT_OUTCOMES,
            ),
            event_loop_lag_seconds: names.histogram(
                "seawall_event_loop_lag_seconds",
                "Delay between the wake-up of a task and its run, behind everything else that was ready to run.",
            ),
            heartbeat_lag_seconds: names.histogram(
                "seawall_heartbeat_lag_seconds",
                "Delay of a session's ping, after the tick of 100 ms within which it is due.",
            ),
            observer_lag_seconds: names.gauge(
                "seawall_observer_lag_seconds",
                "How late this node lately ran: while it is, presence is as old as this.",
            ),
            local_health: names.gauge(
                "seawall_local_health",
                "How far this node mistrusts itself, 0 to 7: each 500 ms of lag is a point, each 5 s without takes one away. From 3 on nobody goes offline for silence.",
            ),
            silent_sessions: names.gauges(
                "seawall_silent_sessions",
                "Sessions that left two pings unanswered. `silent`: no deadline has passed. `suspect`: it has. `held`: presence is unknown, since many of their group went silent together.",
                "state",
                &SILENT_STATES,
            ),
            silence_checks: names.family(
                "seawall_silence_checks_total",
                "Silent devices past their deadline of which the kernel was asked. `unread`: it held bytes of theirs. `recent`: a part of a message came lately. `silent`: nothing did.",
                &[],
                "outcome",
                &session::Finding::ALL.map(session::Finding::as_str),
            ),
            presence_groups_held: names.gauge(
                "seawall_presence_groups_held",
                "Groups of devices that went silent together and are held, at most 65.",
            ),
            presence_changes: names.family(
                "seawall_presence_changes_total",
                "Changes of presence, by the new state. One event may tell many of them: see `presence_group`.",
                &[],
                "state",
                &PRESENCE_STATES,
            ),
            handshakes_under_way: names.gauges(
                "seawall_handshakes_under_way",
                "Connections whose head is not complete. `place`: with a permit, at most limits.handshakes_max; then connections wait to be accepted. `aside`: parked, at most eight times as many; then the latest are rejected. `silent`: nothing was sent; at most four for each free connection.",
                "state",
                &["place", "aside", "silent"],
            ),
            accept_pauses: names.counter(
                "seawall_accept_pauses_total",
                "Pauses in accepting devices or API connections: out of files, or out of memory.",
            ),
            proposals: names.gauges(
                "seawall_proposals",
                "Proposals of the cohort breaker. `open`: a person decides. `applied`: the rule holds.",
                "state",
                &["open", "applied"],
            ),
            versions_tested: names.gauges(
                "seawall_versions_tested",
                "Firmware versions whose devices are limited. `unproven`: there is no verdict yet. `worse`: they fail more often than others.",
                "state",
                &["unproven", "worse"],
            ),
            version_refusals: names.counter(
                "seawall_version_refusals_total",
                "Attempts refused because the firmware version has not proved itself. They are `overloaded` in seawall_handshakes_total.",
            ),
            lookup_cohorts_apart: names.gauge(
                "seawall_lookup_cohorts_apart",
                "Isolated cohorts: their lookups cost far more than those of others, and are sent separately.",
            ),
            plan_alarm: names.gauge(
                "seawall_plan_alarm",
                "1 while a statement of the connect path is planned as a sequential scan.",
            ),
            faults: names.gauges(
                "seawall_faults",
                "Faults of the database, its registry and the disk: 1 while active. `/readyz` has the same reasons, and an alarm has details.",
                "fault",
                &Fault::ALL.map(Fault::as_str),
            ),
            alarm_active: names.gauges(
                "seawall_alarm_active",
                "Active alarms by kind. `seawall alarms` lists them.",
                "kind",
                &alarms::kinds(),
            ),
            database_errors: names.family(
                "seawall_database_errors_total",
                "Failed calls to the database by purpose. One statement of `lookup` stands for many devices.",
                &[],
                "operation",
                &Operation::ALL.map(Operation::as_str),
            ),
            replacements: names.counter(
                "seawall_session_replacements_total",
                "Sessions replaced by a newer one of the same device.",
            ),
            duplicate_ids: names.gauge(
                "seawall_duplicate_ids",
                "Device ids whose sessions were replaced five times within ten minutes: several devices share one. At most 4,096 ids are watched.",
            ),
            webhook_deliveries: names.family(
                "seawall_webhook_deliveries_total",
                "Messages to the webhook by outcome. `retried`: an attempt failed, and another follows. `given_up`: it was answered 410, or failed for an hour. `dropped`: too many waited.",
                &[],
                "outcome",
                &Delivery::ALL.map(Delivery::as_str),
            ),
            webhook_waiting: names.gauge("seawall_webhook_waiting", "Messages that wait for the webhook; at most 1,000."),
            dropped: names.family(
                "seawall_dropped_total",
                "Entries dropped because a bounded buffer was full. `log`: lines that standard error was too slow for.",
                &[],
                "buffer",
                &BUFFERS,
            ),
            slots_stateless: names.counter(
                "seawall_slots_stateless_total",
                "Slots issued while the memory for slots was full: they are in their tokens only.",
            ),
            task_panics: names.counter(
                "seawall_task_panics_total",
                "Panicked tasks of device connections, API calls and background work. Each is a bug. It ends one connection or call; background tasks are restarted.",
            ),
            memory_bytes: names.gauges(
                "seawall_memory_bytes",
                "Memory in use and its limit. Of this process's cgroup or an enclosing one without page cache, server.max_memory_bytes or the machine: the one nearest to its limit. 0 if nothing can be measured.",
                "kind",
                &["used", "limit"],
            ),
            memory_alarm: names.gauge(
                "seawall_memory_alarm",
                "1 while memory is short: new devices are refused with `overloaded`, and live sessions stay.",
            ),
            memory_refusals: names.counter(
                "seawall_memory_refusals_total",
                "Devices refused with `overloaded` because they did not fit into memory.",
            ),
            config_fetches: names.family(
                "seawall_config_fetches_total",
                "Requests for the configuration that nodes share (`[source]`). `taken`: a new one is in use. `unchanged`: the one in use is confirmed. All others change nothing.",
                &[],
                "outcome",
                &Outcome::ALL.map(Outcome::as_str),
            ),
            config_age_seconds: names.gauge(
                "seawall_config_age_seconds",
                "Time since a URL of `[source]` confirmed the configuration in use; 0 without such a URL.",
            ),
            tls_reloads: names.family(
                "seawall_tls_reloads_total",
                "Reloads of certificates and keys, after a change or at SIGHUP. After `refused` the previous ones stay in use, and /readyz says `tls_files`.",
                &[],
                "outcome",
                &["taken", "refused"],
            ),
            tls_certificate_seconds: names.gauges(
                "seawall_tls_certificate_expires_seconds",
                "Time until the certificate of a listener expires, or the first of its chain; +Inf without TLS.",
                "listener",
                &TLS_LISTENERS,
            ),
            tls_revocation_list_seconds: names.gauge(
                "seawall_tls_revocation_list_expires_seconds",
                "Time until the next update of the first list in tls.client_crl, negative after that; +Inf without lists. A list that is out of date stays in use.",
            ),
        };
        let build = names.gauges(
            "seawall_build_info",
            "Always 1; `version` is that of this program.",
            "version",
            &[env!("CARGO_PKG_VERSION")],
        );
        build.set(env!("CARGO_PKG_VERSION"), 1.0);
        for listener in TLS_LISTENERS {
            metrics.tls_certificate_seconds.set(listener, f64::INFINITY);
        }
        metrics.tls_revocation_list_seconds.set(f64::INFINITY);
        metrics.catalog = names.into_catalog();
        metrics
    }

    /// Text of `/metrics` in the Prometheus exposition format, without the series of cohorts and the process.
    #[must_use]
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// Text of docs/METRICS.md.
    #[must_use]
    pub fn document(&self) -> String {
        let rows = self.catalog.iter().chain(&RENDERED_SERIES).chain(&process::SERIES);
        format!("{DOCUMENT_HEAD}{}", series::table(rows))
    }

    /// Aggregates histogram samples. Call it every few seconds: the exporter keeps each sample until then.
    pub fn aggregate(&self) {
        self.handle.run_upkeep();
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Series that [`crate::fleet::cohorts`] and [`crate::fleet::rules`] render.
static RENDERED_SERIES: [Definition; 3] = [
    Definition {
        name: "seawall_rule_hits_total",
        kind: "counter",
        help: "Effects of a firmware rule on this node: connect attempts `refused`, `restricted` or `throttled`, sessions `evicted`, and in `dry_run` the attempts that it would have applied to. `rule` is its id; the 50 newest rules.",
        labels: Vec::new(),
    },
    Definition {
        name: "seawall_cohort_sessions",
        kind: "gauge",
        help: "Live sessions. `cohort` is model/version, escaped, at most 64 bytes; at most 50 of them, the rest as `other`.",
        labels: Vec::new(),
    },
    Definition {
        name: "seawall_cohort_handshakes_total",
        kind: "counter",
        help: "Connect attempts by cohort (as in seawall_cohort_sessions) and outcome (as in seawall_handshakes_total). A refused device counts by its claims, with the model of its last session here if it names none. It counts as `other` unless an authenticated device is in that cohort.",
        labels: Vec::new(),
    },
];

const DOCUMENT_HEAD: &str = "\
<!-- Generated from the gateway's metrics; `UPDATE=1 cargo test -p seawall-gateway --lib metrics` writes it again. -->
# Metrics

`GET /metrics` on the ops listener, in the Prometheus exposition format, without a token. [OPERATIONS](OPERATIONS.md#metrics-to-alert-on) says which to alert on.

- Base units.
- Label sets are closed: a device id, an address or a raw firmware text is never a label. There are two exceptions, each bounded at 50 values: `cohort`, and `rule`, which is the id of a rule that an operator made.
- Histograms have fixed buckets, so that they can be summed over nodes.

| name | kind | what | labels |
|---|---|---|---|
";

#[cfg(test)]
mod tests;
