//! The event stream.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    time::Duration,
};

use serde_json::{Value, json};

use super::rig::{Gateway, V1};

/// An open stream, read line by line.
pub struct Stream(BufReader<TcpStream>);

#[derive(Debug)]
pub struct Event {
    pub id: Option<u64>,
    pub name: String,
    pub data: Value,
}

impl Stream {
    pub fn open(gateway: &Gateway, last_id: Option<&str>) -> Self {
        Self::open_as(gateway, &gateway.admin, last_id)
    }

    /// With filters, as in `?type=drain`.
    pub fn open_with(gateway: &Gateway, query: &str) -> Self {
        Self::open_on(gateway, &gateway.admin, query, None)
    }

    fn open_as(gateway: &Gateway, bearer: &str, last_id: Option<&str>) -> Self {
        Self::open_on(gateway, bearer, "", last_id)
    }

    fn open_on(gateway: &Gateway, bearer: &str, query: &str, last_id: Option<&str>) -> Self {
        let mut stream = TcpStream::connect(gateway.ops()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let last_id = last_id.map_or(String::new(), |id| format!("Last-Event-ID: {id}\r\n"));
        write!(
            stream,
            "GET /api/v1/events{query} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bearer}\r\n{last_id}\r\n"
        )
        .unwrap();
        let mut stream = Self(BufReader::new(stream));
        assert!(stream.line().starts_with("HTTP/1.1 200"));
        // The first comment: from here no event is missed.
        while stream.line() != ": seawall" {}
        stream
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        assert_ne!(self.0.read_line(&mut line).unwrap(), 0, "the stream ended");
        line.trim_end().to_owned()
    }

    pub fn event(&mut self) -> Event {
        let (mut id, mut name) = (None, String::new());
        loop {
            let line = self.line();
            if let Some(text) = line.strip_prefix("id: ") {
                id = Some(text.parse().unwrap());
            } else if let Some(text) = line.strip_prefix("event: ") {
                name = text.to_owned();
            } else if let Some(text) = line.strip_prefix("data: ") {
                let data = serde_json::from_str(text).unwrap();
                return Event { id, name, data };
            }
        }
    }

    /// Reads until the gateway ends the stream.
    fn wait_for_end(&mut self) {
        let mut line = String::new();
        while self.0.read_line(&mut line).unwrap() != 0 {
            // The last chunk of the body: the connection itself may stay open.
            if line.trim_end() == "0" {
                return;
            }
            line.clear();
        }
    }

    /// The next event of this name.
    pub fn of(&mut self, name: &str) -> Event {
        loop {
            let event = self.event();
            if event.name == name {
                return event;
            }
        }
    }
}

#[test]
fn presence_messages_rules_and_drains_are_told_as_they_happen() {
    let gateway = Gateway::start();
    let mut stream = Stream::open(&gateway, None);

    let (id, mut device) = gateway.connected(&[V1]);
    let online = stream.of("presence");
    gateway.block_on(device.text("{\"type\":\"message\",\"id\":\"m1\",\"topic\":\"t\",\"payload\":{\"a\":\n1}}"));
    let message = stream.of("message");
    gateway.post("/api/v1/rules", json!({"match": {"model": "m"}, "effect": "block"}));
    let rules = stream.of("rules");
    gateway.post("/api/v1/drain", json!({}));
    let drain = stream.of("drain");

    assert_eq!(
        (&online.data["device"], &online.data["state"]),
        (&json!(id), &json!("online"))
    );
    assert_eq!(message.data["payload"], json!({"a": 1}));
    assert_eq!(
        (&message.data["device"], &message.data["topic"]),
        (&json!(id), &json!("t"))
    );
    assert_eq!(rules.data["revision"], 1);
    assert_eq!(drain.data["state"], "draining");
    assert!(online.id < message.id && message.id < rules.id && rules.id < drain.id);
    assert!(online.id.unwrap() < 1 << 53, "exact in every JSON reader");
}

#[test]
fn a_stream_ends_with_its_token() {
    let gateway = Gateway::start();
    let created = gateway
        .post("/api/v1/tokens", json!({"name": "spy", "role": "viewer"}))
        .json();
    let token = created["token"].as_str().unwrap();
    let mut of_revoked = Stream::open_as(&gateway, token, None);
    let mut of_admin = Stream::open(&gateway, None);

    gateway.delete(&format!("/api/v1/tokens/{}", created["id"].as_str().unwrap()));
    of_revoked.wait_for_end();
    gateway.connected(&[]);
    of_admin.of("presence");
    std::fs::write(gateway.data_dir.join("admin.token"), "n".repeat(43)).unwrap();
    of_admin.wait_for_end();
}

#[test]
fn a_stream_tells_proxies_to_hand_each_event_on() {
    let gateway = Gateway::start();
    let mut stream = TcpStream::connect(gateway.ops()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let bearer = &gateway.admin;
    write!(
        stream,
        "GET /api/v1/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bearer}\r\n\r\n"
    )
    .unwrap();

    let head: Vec<String> = BufReader::new(stream)
        .lines()
        .map_while(Result::ok)
        .take_while(|line| !line.is_empty())
        .collect();

    assert!(head.contains(&"x-accel-buffering: no".to_owned()), "{head:?}");
    assert!(
        head.contains(&"cache-control: no-store, no-transform".to_owned()),
        "{head:?}"
    );
}

#[test]
fn a_reader_that_comes_back_gets_what_it_missed() {
    let gateway = Gateway::start();
    let mut stream = Stream::open(&gateway, None);
    let (_, device) = gateway.connected(&[]);
    let seen = stream.of("presence").id.unwrap();
    drop(stream);

    drop(device);
    gateway.eventually(|| gateway.state().sessions.is_empty());
    let mut again = Stream::open(&gateway, Some(&seen.to_string()));

    let event = again.event();
    assert_eq!(
        (event.name.as_str(), &event.data["state"]),
        ("presence", &json!("offline"))
    );
    assert_eq!(event.id, Some(seen + 1));
}

#[test]
fn a_reader_from_before_the_start_is_told_that_it_missed_something_once() {
    let gateway = Gateway::start();
    let (_, _device) = gateway.connected(&[]);

    for last_id in ["17", "9007199254740991"] {
        let mut stream = Stream::open(&gateway, Some(last_id));
        let missed = stream.event();
        let first = stream.event();

        assert_eq!((missed.name.as_str(), missed.id), ("missed", None));
        assert_ne!(first.name, "missed");
    }
    let bearer = format!("Bearer {}", gateway.admin);
    let headers = [("authorization", bearer.as_str()), ("last-event-id", "x")];
    assert_eq!(gateway.raw("GET", "/api/v1/events", &headers, "").problem().0, 400);
}

#[test]
fn empty_last_event_id_is_that_of_a_reader_which_has_read_nothing() {
    let gateway = Gateway::start();
    let (_, _before) = gateway.connected(&[V1]);
    gateway.eventually(|| gateway.state().history.known_len() == 1);
    // A device that leaves would be the next event.
    let mut held = Vec::new();

    for last_id in ["", "  "] {
        let mut stream = Stream::open(&gateway, Some(last_id));
        let (id, device) = gateway.connected(&[V1]);
        held.push(device);

        let first = stream.event();
        assert_eq!((first.name.as_str(), &first.data["device"]), ("presence", &json!(id)));
    }
}

#[test]
fn readers_are_bounded_and_leave_room_when_they_go() {
    let gateway = Gateway::start_with("[ops]\nevent_readers_max = 2\n");
    let first = Stream::open(&gateway, None);
    let second = Stream::open(&gateway, None);

    let refused = gateway.get("/api/v1/events");

    assert_eq!(refused.problem(), (503, "too_many_readers".into()));
    drop((first, second));
    gateway.eventually(|| {
        let mut stream = TcpStream::connect(gateway.ops()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        write!(
            stream,
            "GET /api/v1/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\n\r\n",
            gateway.admin
        )
        .unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        line.starts_with("HTTP/1.1 200")
    });
}
