//! Every metric of the gateway, its name, its help text and its closed set of labels. Nothing else in the crate names a metric.
//!
//! One recorder a gateway, not one a process: tests run several gateways side by side. Handles are looked up once, here, so that
//! counting on the way of a device is one atomic addition. The per-cohort series are rendered by [`crate::cohorts`], because their label
//! set changes while the process runs.

use metrics::{Counter, Gauge, Histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use seawall_proto::{
    admission::{BreakerState, LimitReason},
    handshake::ResumeOutcome,
    refusal::{Code, Limit},
    resume::Finding,
};

use crate::{
    faults::Fault,
    process,
    series::{self, Definition, Family, GaugeFamily, HistogramFamily, Names},
    store::Operation,
};

/// Upper bounds, in seconds, of what a device waits for: from a local cache hit to the longest answer that the contract allows.
const WAIT_BUCKETS_SECONDS: [f64; 14] = [
    0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0,
];
/// Upper bounds, in seconds, of hints: from the shortest slot to the longest hint for a blocked device.
const HINT_BUCKETS_SECONDS: [f64; 12] = [
    0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1_800.0, 3_600.0,
];

/// Upper bounds, in seconds, of session lengths: from a connection that breaks at once to a session that is closed for its age.
const SESSION_BUCKETS_SECONDS: [f64; 11] = [
    1.0, 10.0, 60.0, 300.0, 900.0, 3_600.0, 10_800.0, 28_800.0, 64_800.0, 86_400.0, 108_000.0,
];

/// Handles of all metrics with a fixed label set.
pub struct Metrics {
    handle: PrometheusHandle,
    catalog: Vec<Definition>,
    /// Live WebSocket sessions.
    pub sessions: Gauge,
    pub listening: Gauge,
    /// 1 while `/readyz` says 200.
    pub ready: Gauge,
    /// 1 while a drain is on.
    pub draining: Gauge,
    /// 1 while the database answers.
    pub database_up: Gauge,
    /// State of the breaker before the database: 1 for the state that it is in.
    pub breaker: GaugeFamily,
    /// TCP connections that never became a request, by what became of them.
    pub connections: Family,
    /// Connect attempts (a connection that sent at least a byte of a request to /v1/connect), by outcome. The sum is every attempt.
    pub handshakes: Family,
    /// Connections refused with `throttled` or given up, by the limit that refused.
    pub throttled: Family,
    /// Time from accept to the answer of a connect attempt.
    pub handshake_duration_seconds: Histogram,
    /// Registry look-ups by outcome, one a device.
    pub lookups: Family,
    /// Time a look-up statement took, from sent to answered.
    pub lookup_duration_seconds: Histogram,
    /// Look-up statements sent to the database.
    pub lookup_statements: Counter,
    /// Resume tokens shown, by outcome.
    pub resumes: Family,
    /// Resume tokens given to devices, by occasion.
    pub resume_tokens: Family,
    /// Look-ups of devices that came back by token, by what was found.
    pub resume_drills: Family,
    /// Devices whose older resume tokens do not count.
    pub revoked_devices: Gauge,
    /// Time since the revocations were last confirmed by the database.
    pub revocations_age_seconds: Gauge,
    /// Devices of the roster.
    pub roster_devices: Gauge,
    /// Time since the registry was as the roster says.
    pub roster_age_seconds: Gauge,
    /// Distinct keys sent to the database and not yet answered. Never above `seawall_admission_limit`.
    pub lookups_in_flight: Gauge,
    /// The most keys that may be in flight now.
    pub admission_limit: Gauge,
    /// Why the limit is what it is: 1 for the reason in force.
    pub admission_limit_reason: GaugeFamily,
    /// How much of one percent more in flight came out as answers, lately.
    pub admission_elasticity: Gauge,
    /// What the database is known to answer.
    pub admission_capacity: GaugeFamily,
    /// 1 while the limit's ceiling holds throughput back.
    pub admission_ceiling_alarm: Gauge,
    /// Devices waiting for a look-up.
    pub admission_queue: Gauge,
    /// Hints given to refused devices, by the limit that refused.
    pub retry_hint_seconds: HistogramFamily<1>,
    /// Sessions ended, by reason.
    pub closes: Family,
    /// Time from the upgrade of a session to its end.
    pub session_duration_seconds: Histogram,
    /// Payload bytes of data frames.
    pub session_bytes: Family,
    /// Time from the head of an API request to the head of its answer, by [`API_CALLS`] and [`API_STATUSES`].
    pub api_request_duration_seconds: HistogramFamily<2>,
    /// Revision of the firmware rules in force on this node.
    pub rules_revision: Gauge,
    /// Stored rules that this version can't enforce.
    pub rules_unsupported: Gauge,
    /// Rules in force that the database has lost.
    pub rules_lost: Gauge,
    /// Time since the rules in force were last confirmed by the database.
    pub rules_age_seconds: Gauge,
    /// Registered devices that this node knows of, by presence.
    pub presence_devices: GaugeFamily,
    /// Messages from devices.
    pub messages_in: Family,
    /// Messages to devices.
    pub messages_out: Family,
    /// How late a task that asked to run at once did run.
    pub event_loop_lag_seconds: Histogram,
    /// Handshakes whose head is not complete, by what they hold.
    pub handshakes_under_way: GaugeFamily,
    /// Times that accepting paused because the process or the machine was out of files.
    pub accept_pauses: Counter,
    /// Cohorts that are looked up apart, because their look-ups cost far more than the others'.
    pub lookup_cohorts_apart: Gauge,
    /// 1 while the plan guard sees a sequential scan on the connect path.
    pub plan_alarm: Gauge,
    /// Failed calls to the database, by what they were for.
    pub database_errors: Family,
    /// What is wrong with the database, the registry in it and the disk.
    pub faults: GaugeFamily,
    /// Sessions replaced by a newer session of the same device.
    pub replacements: Counter,
    /// Ids that devices share: their sessions replace each other.
    pub duplicate_ids: Gauge,
    /// Entries dropped because a bounded buffer was full, by buffer.
    pub dropped: Family,
    /// Slots given to ids for which the memory of slots had no room: they live in their tokens alone.
    pub slots_stateless: Counter,
    /// Tasks that panicked.
    pub task_panics: Counter,
    /// Memory, used and allowed.
    pub memory_bytes: GaugeFamily,
    /// 1 while memory is short.
    pub memory_alarm: Gauge,
    /// Devices sent away because memory was short.
    pub memory_refusals: Counter,
    /// TLS files that were looked at anew, by what became of them.
    pub tls_reloads: Family,
    /// Time until a listener's certificate ends.
    pub tls_certificate_seconds: GaugeFamily,
    /// Time until a revocation list should be replaced.
    pub tls_revocation_list_seconds: Gauge,
}

/// What became of a TCP connection that never was a request. Label `outcome` of `seawall_connections_total`.
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
/// Label `limit` of `seawall_retry_hint_seconds` where no [`Limit`] refused.
pub const NO_LIMIT: &str = "none";
/// Label `listener` of `seawall_tls_certificate_expires_seconds`.
pub const TLS_LISTENERS: [&str; 2] = ["devices", "ops"];
/// Label `outcome` of `seawall_lookups_total`.
pub const LOOKUP_OUTCOMES: [&str; 5] = ["found", "not_found", "cached", "failed", "timed_out"];
/// Label `measure` of `seawall_admission_capacity_keys_per_second`.
pub const CAPACITY_MEASURES: [&str; 4] = ["measured", "peak", "last_known_good", "reference"];
/// Label `reason` of `seawall_closes_total`: the words of [`Close::as_str`](seawall_proto::close::Close::as_str), and how a peer ends one.
pub const CLOSE_REASONS: [&str; 18] = [
    "normal",
    "protocol",
    "wrong_kind",
    "not_utf8",
    "policy",
    "too_big",
    "draining",
    "ageing",
    "evicted",
    "heartbeat_missed",
    "disabled",
    "disconnected",
    "replaced",
    "revoked",
    "client_gone",
    "slow_reader",
    "shutdown",
    "failed",
];
/// Label `outcome` of `seawall_messages_total` for messages from devices.
pub const MESSAGE_IN_OUTCOMES: [&str; 4] = ["accepted", "buffer_full", "bad_frame", "rate_limited"];
/// Label `outcome` of `seawall_messages_total` for messages to devices.
pub const MESSAGE_OUT_OUTCOMES: [&str; 5] = ["acked", "sent", "device_offline", "mailbox_full", "refused"];
/// Label `occasion` of `seawall_resume_tokens_total`.
pub const TOKEN_OCCASIONS: [&str; 3] = ["welcome", "renewal", "drain"];
/// Label `call` of `seawall_api_request_duration_seconds`.
pub const API_CALLS: [&str; 4] = ["read", "change", "import", "public"];
/// Label `status` of `seawall_api_request_duration_seconds`.
pub const API_STATUSES: [&str; 3] = ["success", "client_error", "server_error"];
/// Label `buffer` of `seawall_dropped_total`.
pub const BUFFERS: [&str; 2] = ["events", "log"];

impl Metrics {
    /// All series at zero, so that rates exist from the first scrape on.
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
        let mut drill_outcomes = Finding::ALL.map(Finding::as_str).to_vec();
        drill_outcomes.extend(["failed", "dropped"]);

        let mut metrics = Self {
            handle: recorder.handle(),
            catalog: Vec::new(),
            sessions: names.gauge("seawall_sessions", "Live WebSocket sessions."),
            listening: names.gauge(
                "seawall_listening",
                "1 while devices can connect; 0 while a full gateway leaves its address to others that share it.",
            ),
            ready: names.gauge("seawall_ready", "1 while /readyz answers 200: new devices should be sent here."),
            draining: names.gauge("seawall_draining", "1 while this node sends its sessions away, or has done so."),
            database_up: names.gauge(
                "seawall_database_up",
                "1 while the database answers; 0 before the first contact and while it is away.",
            ),
            breaker: names.gauges(
                "seawall_admission_breaker",
                "State of the breaker before the database: 1 for the state that it is in, 0 for the others. Other than `closed`, devices can't be looked up.",
                "state",
                &BreakerState::ALL.map(BreakerState::as_str),
            ),
            connections: names.family(
                "seawall_connections_total",
                "TCP connections accepted, by what became of them; `request` is counted in seawall_handshakes_total, `probe` asked for /readyz, `silent` and `address_limited` sent nothing, `tls_failed` was no TLS handshake or none in time, `plain_http` began without TLS where TLS is spoken, `proxy_failed` came from a trusted address and had no PROXY header.",
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
                "Connections refused with `throttled`, by the limit that refused. Two kinds of them are not attempts: those that had sent nothing, and those given up in a TLS handshake or a PROXY header, which get no answer and no hint.",
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
                "Registry look-ups by outcome, one a device.",
                &[],
                "outcome",
                &LOOKUP_OUTCOMES,
            ),
            lookup_duration_seconds: names.histogram(
                "seawall_lookup_duration_seconds",
                "Time a look-up statement took, from sent to answered.",
            ),
            lookup_statements: names.counter(
                "seawall_lookup_statements_total",
                "Look-up statements sent to the database; each carries up to 256 keys. Probes of a database that is away look nobody up, and do not count.",
            ),
            resumes: names.family(
                "seawall_resumes_total",
                "Resume tokens shown, by outcome. `resumed` and `graced` let their devices in without a look-up, `blocked` met a rule, the others were ignored.",
                &[],
                "outcome",
                &ResumeOutcome::ALL.map(ResumeOutcome::as_str),
            ),
            resume_tokens: names.family(
                "seawall_resume_tokens_total",
                "Resume tokens given to devices.",
                &[],
                "occasion",
                &TOKEN_OCCASIONS,
            ),
            resume_drills: names.family(
                "seawall_resume_drills_total",
                "Devices let in by a resume token that were looked up afterwards, one in 100, by what was found; `failed`: the database did not answer, `dropped`: too many waited. Their statements are in no other metric.",
                &[],
                "outcome",
                &drill_outcomes,
            ),
            revoked_devices: names.gauge(
                "seawall_revoked_devices",
                "Devices whose older resume tokens do not count, of at most 65,536 that are remembered.",
            ),
            revocations_age_seconds: names.gauge(
                "seawall_revocations_age_seconds",
                "Time since the database last confirmed the revocations of resume tokens.",
            ),
            roster_devices: names.gauge(
                "seawall_roster_devices",
                "Registered devices of the roster that this node tells strangers by, of at most 16,000,000; 8 bytes each.",
            ),
            roster_age_seconds: names.gauge(
                "seawall_roster_age_seconds",
                "Time since the registry was as the roster says, also over restarts; since the start where there is none.",
            ),
            lookups_in_flight: names.gauge(
                "seawall_lookups_in_flight",
                "Distinct keys sent to the database and not answered. Never above seawall_admission_limit.",
            ),
            admission_limit: names.gauge("seawall_admission_limit", "The most keys that may be in flight now."),
            admission_limit_reason: names.gauges(
                "seawall_admission_limit_reason",
                "Why the limit is what it is: 1 for the reason in force, 0 for the others.",
                "reason",
                &LimitReason::ALL.map(LimitReason::as_str),
            ),
            admission_elasticity: names.gauge(
                "seawall_admission_elasticity",
                "How much of one percent more in flight came out as answers, lately: 1 below the database's knee, 0 at it.",
            ),
            admission_capacity: names.gauges(
                "seawall_admission_capacity_keys_per_second",
                "What the database answers: as last measured while devices waited, the best of ten minutes, the last known good, and the reference that slots go by.",
                "measure",
                &CAPACITY_MEASURES,
            ),
            admission_ceiling_alarm: names.gauge(
                "seawall_admission_ceiling_alarm",
                "1 while devices wait because admission.keys_in_flight_max is too low.",
            ),
            admission_queue: names.gauge("seawall_admission_queue", "Devices waiting for a look-up."),
            retry_hint_seconds: names.histograms(
                "seawall_retry_hint_seconds",
                "Hints given to refused devices, also to those that had sent nothing, by the limit that refused; `none`: refused for another reason than `throttled`.",
                [("limit", &hint_limits)],
            ),
            closes: names.family(
                "seawall_closes_total",
                "Sessions ended, by reason.",
                &[],
                "reason",
                &CLOSE_REASONS,
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
                "Stored rules that this version of the gateway can't enforce: they refuse nobody.",
            ),
            rules_lost: names.gauge(
                "seawall_rules_lost",
                "Rules in force on this node that the database has lost.",
            ),
            rules_age_seconds: names.gauge(
                "seawall_rules_age_seconds",
                "Time since the database last confirmed the rules in force.",
            ),
            presence_devices: names.gauges(
                "seawall_presence_devices",
                "Devices that this node has seen, by presence.",
                "state",
                &["online", "offline", "unknown"],
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
            event_loop_lag_seconds: names.histogram(
                "seawall_event_loop_lag_seconds",
                "How late a task that asked to be woken did run.",
            ),
            handshakes_under_way: names.gauges(
                "seawall_handshakes_under_way",
                "Connections whose head is not complete: those that hold a `place` (at most limits.handshakes_max; then connections wait to be accepted), and late ones that stepped `aside` (at most eight times as many; then those of a crowd are given up). `silent` ones have sent nothing: at most four of them for each connection that is free.",
                "state",
                &["place", "aside", "silent"],
            ),
            accept_pauses: names.counter(
                "seawall_accept_pauses_total",
                "Times that accepting devices or API connections paused: out of files, or out of memory.",
            ),
            lookup_cohorts_apart: names.gauge(
                "seawall_lookup_cohorts_apart",
                "Cohorts that are looked up apart, because their look-ups cost far more than the others'.",
            ),
            plan_alarm: names.gauge(
                "seawall_plan_alarm",
                "1 while a statement of the connect path is planned as a sequential scan.",
            ),
            faults: names.gauges(
                "seawall_faults",
                "What is wrong with the database, the registry in it and the disk: 1 while it is. `/readyz` has the same reasons, and an alarm says more.",
                "fault",
                &Fault::ALL.map(Fault::as_str),
            ),
            database_errors: names.family(
                "seawall_database_errors_total",
                "Failed calls to the database, by what they were for: the statements of `lookup` stand for many devices each.",
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
                "Device ids whose sessions were replaced five times within ten minutes: several devices share one. Of at most 4,096 ids watched.",
            ),
            dropped: names.family(
                "seawall_dropped_total",
                "Entries dropped because a bounded buffer was full; `log`: lines of this process that standard error was too slow for.",
                &[],
                "buffer",
                &BUFFERS,
            ),
            slots_stateless: names.counter(
                "seawall_slots_stateless_total",
                "Slots given while the memory of slots was full: they live in their tokens alone.",
            ),
            task_panics: names.counter(
                "seawall_task_panics_total",
                "Tasks that panicked: of device connections, calls of the API and helpers. Each is a bug; it ends one connection or call, and a helper is started again.",
            ),
            memory_bytes: names.gauges(
                "seawall_memory_bytes",
                "Memory in use and its limit: of this process's cgroup or one around it, without page cache, or of server.max_memory_bytes or the machine; of several the one nearest to its limit. 0 where nothing can be measured.",
                "kind",
                &["used", "limit"],
            ),
            memory_alarm: names.gauge(
                "seawall_memory_alarm",
                "1 while memory is short: new devices are refused with `overloaded`, live sessions stay.",
            ),
            memory_refusals: names.counter(
                "seawall_memory_refusals_total",
                "Devices refused with `overloaded` because they did not fit into memory.",
            ),
            tls_reloads: names.family(
                "seawall_tls_reloads_total",
                "Certificates and keys read anew, after a change or at SIGHUP. After `refused` those before stay in use, and /readyz says `tls_files`.",
                &[],
                "outcome",
                &["taken", "refused"],
            ),
            tls_certificate_seconds: names.gauges(
                "seawall_tls_certificate_expires_seconds",
                "Time until the certificate of a listener ends, or the first of its chain; +Inf where it speaks no TLS.",
                "listener",
                &TLS_LISTENERS,
            ),
            tls_revocation_list_seconds: names.gauge(
                "seawall_tls_revocation_list_expires_seconds",
                "Time until the first list in tls.client_crl should be replaced by a newer one, negative after that; +Inf where there is none. A list that is out of date counts all the same.",
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

    /// Text of `/metrics` but for cohorts and process, in the Prometheus exposition format.
    #[must_use]
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// docs/METRICS.md.
    #[must_use]
    pub fn document(&self) -> String {
        let rows = self.catalog.iter().chain(&RENDERED_SERIES).chain(&process::SERIES);
        format!("{DOCUMENT_HEAD}{}", series::table(rows))
    }

    /// Folds histogram samples together. To be called every few seconds: the exporter keeps each sample until then.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// What [`crate::cohorts`] and [`crate::rules`] render.
static RENDERED_SERIES: [Definition; 3] = [
    Definition {
        name: "seawall_rule_hits_total",
        kind: "counter",
        help: "What a firmware rule did on this node: connect attempts refused, sessions evicted. `rule` is its id; the 50 rules made last.",
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
        help: "Connect attempts. `cohort` as above, `outcome` as for `seawall_handshakes_total`. A refused device counts by what it says of itself, or with the model of its last session here where it names none; under `other` where no authenticated device has made that cohort.",
        labels: Vec::new(),
    },
];

const DOCUMENT_HEAD: &str = "\
<!-- Made from gateway/src/metrics.rs by its test; UPDATE=1 cargo test -p seawall-gateway metrics writes it anew. -->
# Metrics

`GET /metrics` on the ops listener, in the Prometheus exposition format, without a token. Base units; label sets are closed: a device id, an
address or a raw firmware text is never a label. Histograms have fixed buckets, so that they can be summed over nodes.

| name | kind | what | labels |
|---|---|---|---|
";

#[cfg(test)]
mod tests;
