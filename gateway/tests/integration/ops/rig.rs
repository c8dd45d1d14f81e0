//! A whole gateway in this process, its admin, and devices in bytes.

use std::{future::Future, net::SocketAddr, path::PathBuf, time::Duration};

use seawall_gateway::{node::State, runtime::config::DatabaseUrl};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use ureq::{Agent, http};

use crate::harness::{gateway, raw::Device, wait::eventually};

/// Maximum wait for the answer to a call.
const ANSWER_MAX: Duration = Duration::from_secs(20);
pub const V1: &str = "Sec-WebSocket-Protocol: seawall.v1";

/// A running gateway. Stops when dropped.
pub struct Gateway {
    runtime: Runtime,
    gateway: Option<gateway::Gateway>,
    agent: Agent,
    pub admin: String,
    pub data_dir: PathBuf,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: http::HeaderMap,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_default()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// Status and `code` of an error in the API's form.
    pub fn problem(&self) -> (u16, String) {
        assert_eq!(self.header("content-type"), "application/problem+json", "{self:?}");
        let json = self.json();
        assert_eq!(json["status"], self.status, "{self:?}");
        let code = json["code"].as_str().unwrap().to_owned();
        assert_eq!(json["type"], format!("urn:seawall:problem:{code}"), "{self:?}");
        assert!(json["title"].is_string() && json["detail"].is_string(), "{self:?}");
        (self.status, code)
    }
}

impl Gateway {
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// Starts with these settings over the defaults, as TOML.
    pub fn start_with(settings: &str) -> Self {
        Self::start_on(None, settings)
    }

    /// Starts on a database that may be shared.
    pub fn start_on(database: Option<&DatabaseUrl>, settings: &str) -> Self {
        let runtime = Runtime::new().unwrap();
        let gateway = runtime.block_on(gateway::Gateway::start_on(database, settings));
        Self::of(runtime, gateway)
    }

    /// Ends it, runs `between`, and starts it again on the same data directory.
    pub fn restart_on(mut self, database: Option<&DatabaseUrl>, between: impl FnOnce()) -> Self {
        let gateway = self.gateway.take().unwrap();
        let home = self.block_on(gateway.stop_and_keep());
        between();
        let runtime = Runtime::new().unwrap();
        let gateway = runtime.block_on(gateway::Gateway::start_in(home, database, ""));
        Self::of(runtime, gateway)
    }

    fn of(runtime: Runtime, gateway: gateway::Gateway) -> Self {
        let data_dir = gateway.shared.config.server.data_dir.clone();
        let admin = std::fs::read_to_string(data_dir.join("admin.token")).unwrap();
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .proxy(None)
            .timeout_global(Some(ANSWER_MAX))
            .build()
            .into();
        Self {
            runtime,
            gateway: Some(gateway),
            agent,
            admin: admin.trim().to_owned(),
            data_dir,
        }
    }

    fn gateway(&self) -> &gateway::Gateway {
        self.gateway.as_ref().unwrap()
    }

    pub fn state(&self) -> &State {
        &self.gateway().shared
    }

    pub fn ops(&self) -> SocketAddr {
        self.gateway().ops
    }

    pub fn device_address(&self) -> SocketAddr {
        self.gateway().devices
    }

    #[track_caller]
    pub fn metric(&self, series: &str) -> u64 {
        self.gateway().metric(series)
    }

    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Sends one request, with exactly these headers.
    pub fn raw(&self, method: &str, path: &str, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Answer {
        let mut request = http::Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.ops()));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = body.as_ref();
        let response = if body.is_empty() && matches!(method, "GET" | "DELETE") {
            self.agent.run(request.body(()).unwrap())
        } else {
            self.agent.run(request.body(body.to_vec()).unwrap())
        };
        let mut response = response.unwrap();
        Answer {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            text: response.body_mut().read_to_string().unwrap(),
        }
    }

    /// Sends a request with the token `token`, with an optional body.
    pub fn call_as(&self, token: &str, method: &str, path: &str, body: Option<&Value>) -> Answer {
        let bearer = format!("Bearer {token}");
        match body {
            Some(body) => {
                let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
                self.raw(method, path, &headers, body.to_string())
            }
            None => self.raw(method, path, &[("authorization", &bearer)], ""),
        }
    }

    pub fn get(&self, path: &str) -> Answer {
        self.call_as(&self.admin, "GET", path, None)
    }

    pub fn post(&self, path: &str, body: Value) -> Answer {
        self.call_as(&self.admin, "POST", path, Some(&body))
    }

    pub fn patch(&self, path: &str, body: Value) -> Answer {
        self.call_as(&self.admin, "PATCH", path, Some(&body))
    }

    pub fn delete(&self, path: &str) -> Answer {
        self.call_as(&self.admin, "DELETE", path, None)
    }

    /// A token of this role, created once per role.
    pub fn token(&self, role: &str) -> String {
        let answer = self.post("/api/v1/tokens", json!({"name": format!("test {role}"), "role": role}));
        assert_eq!(answer.status, 201, "{answer:?}");
        answer.json()["token"].as_str().unwrap().to_owned()
    }

    /// Registers a device. Returns its id and secret.
    pub fn register(&self, body: Value) -> (String, String) {
        let answer = self.post("/api/v1/devices", body);
        assert_eq!(answer.status, 201, "{answer:?}");
        let json = answer.json();
        (text(&json["id"]), text(&json["secret"]))
    }

    /// Registers a device and connects it with these additional header lines.
    pub fn connected(&self, lines: &[&str]) -> (String, Device) {
        let (id, secret) = self.register(json!({}));
        let device = self.connect(&id, &secret, lines);
        (id, device)
    }

    pub fn connect(&self, id: &str, secret: &str, lines: &[&str]) -> Device {
        let identity = format!("Seawall-Device: {id}\r\nAuthorization: Bearer {secret}");
        let lines = [&[identity.as_str()], lines].concat();
        let sessions = self.state().sessions.len();
        let device = self.block_on(Device::connect(self.device_address(), &lines));
        self.eventually(|| self.state().sessions.len() > sessions);
        device
    }

    /// Waits until `holds`.
    #[track_caller]
    pub fn eventually(&self, holds: impl FnMut() -> bool) {
        self.block_on(eventually(holds));
    }

    /// Every item of a list, in pages of `limit`.
    pub fn all(&self, path: &str, limit: usize) -> Vec<Value> {
        let mut items = Vec::new();
        let mut cursor = String::new();
        for _ in 0..1_000 {
            let answer = self.get(&format!("{path}limit={limit}{cursor}"));
            assert_eq!(answer.status, 200, "{answer:?}");
            let page = answer.json();
            let rows = page["items"].as_array().unwrap();
            assert!(rows.len() <= limit);
            items.extend(rows.iter().cloned());
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return items,
            }
        }
        panic!("the list has no end");
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if let Some(gateway) = self.gateway.take() {
            self.runtime.block_on(gateway.end());
        }
    }
}

pub fn text(json: &Value) -> String {
    json.as_str().unwrap().to_owned()
}
