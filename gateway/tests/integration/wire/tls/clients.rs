//! Client certificates as identity: who they name, and that the registry still decides.

use rcgen::SanType;
use tokio::io::AsyncWriteExt;

use crate::{
    harness::authority::{Authority, Identity},
    wire::{
        raw::{Response, request, response},
        rig::Gateway,
    },
};

/// Whether a session began, or what the refusal says; `None` where TLS did not come about.
async fn ask_as(
    authority: &Authority,
    gateway: &Gateway,
    identity: Option<&Identity>,
    lines: &[&str],
) -> Option<Response> {
    let mut stream = authority.connect(gateway.devices, identity).await.ok()?;
    stream.write_all(request(lines).as_bytes()).await.ok()?;
    // By TLS 1.3 a client hears of its certificate's refusal when it reads.
    let mut first = [0];
    tokio::io::AsyncReadExt::read_exact(&mut stream, &mut first)
        .await
        .ok()?;
    let rest = tokio::io::AsyncReadExt::chain(&first[..], stream);
    Some(response(&mut Box::pin(rest)).await)
}

fn uri(text: String) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn dns(text: String) -> SanType {
    SanType::DnsName(text.try_into().unwrap())
}

#[tokio::test]
async fn certificate_is_id_and_credential_whichever_name_has_the_uuid() {
    let mut authority = Authority::new();
    let gateway = Gateway::start(&authority.settings_with_clients()).await;
    let (id, _) = gateway.device().await;
    for identity in [
        authority.client("camera", vec![uri(format!("urn:uuid:{id}"))]),
        authority.client("camera", vec![uri(format!("spiffe://fleet.example/device/{id}"))]),
        authority.client("camera", vec![dns(format!("{id}.devices.example"))]),
        authority.client(&id, Vec::new()),
    ] {
        assert_eq!(
            ask_as(&authority, &gateway, Some(&identity), &[]).await.unwrap().status,
            101
        );
        let same = format!("Seawall-Device: {id}");
        assert_eq!(
            ask_as(&authority, &gateway, Some(&identity), &[&same])
                .await
                .unwrap()
                .status,
            101
        );
    }
}

#[tokio::test]
async fn other_id_beside_a_certificate_and_two_ids_in_one_are_bad_requests() {
    let mut authority = Authority::new();
    let gateway = Gateway::start(&authority.settings_with_clients()).await;
    let (id, _) = gateway.device().await;
    let (other, secret) = gateway.device().await;
    let (other_line, bearer) = (
        format!("Seawall-Device: {other}"),
        format!("Authorization: Bearer {secret}"),
    );
    let one = authority.client(&id, Vec::new());
    let two = authority.client("camera", vec![dns(id), dns(other)]);

    let of_other = ask_as(&authority, &gateway, Some(&one), &[&other_line, &bearer])
        .await
        .unwrap();
    let of_two = ask_as(&authority, &gateway, Some(&two), &[]).await.unwrap();

    assert_eq!((of_other.status, of_two.status), (400, 400));
}

#[tokio::test]
async fn registry_decides_about_devices_with_certificates() {
    let mut authority = Authority::new();
    let gateway = Gateway::start(&authority.settings_with_clients()).await;
    let unknown = authority.client("9b0c2e4a-11d2-7f00-8000-0000000000aa", Vec::new());

    assert_eq!(
        ask_as(&authority, &gateway, Some(&unknown), &[]).await.unwrap().status,
        401
    );
}

#[tokio::test]
async fn certificate_is_optional_unless_it_is_required() {
    let mut authority = Authority::new();
    let settings = authority.settings_with_clients();
    let optional = Gateway::start(&settings).await;
    let required = Gateway::start(&format!("{settings}client_certificate_required = true\n")).await;
    let lines = [optional.device_lines().await, required.device_lines().await];
    let nameless = authority.client("a fleet", Vec::new());

    assert_eq!(
        ask_as(&authority, &optional, None, &[&lines[0]]).await.unwrap().status,
        101
    );
    assert!(ask_as(&authority, &required, None, &[&lines[1]]).await.is_none());
    // One that names no device lets its holder say id and secret.
    assert_eq!(
        ask_as(&authority, &required, Some(&nameless), &[&lines[1]])
            .await
            .unwrap()
            .status,
        101
    );
    assert_eq!(
        ask_as(&authority, &required, Some(&nameless), &[])
            .await
            .unwrap()
            .status,
        400
    );
    let stranger = Authority::new().client("x", Vec::new());
    assert!(
        ask_as(&authority, &optional, Some(&stranger), &[&lines[0]])
            .await
            .is_none()
    );
}

#[tokio::test]
async fn revoked_certificate_is_refused_from_the_next_list_on() {
    let mut authority = Authority::new();
    let settings = authority.settings_with_clients();
    let list = authority.write("revoked.pem", &authority.revocations(&[]));
    let gateway = Gateway::start(&format!("{settings}client_crl = {list:?}\n")).await;
    let (id, _) = gateway.device().await;
    let (kept, revoked) = (authority.client(&id, Vec::new()), authority.client(&id, Vec::new()));
    assert_eq!(
        ask_as(&authority, &gateway, Some(&revoked), &[]).await.unwrap().status,
        101
    );
    authority.write("revoked.pem", &authority.revocations(&[&revoked.serial]));

    seawall_gateway::tls::reload_now(&gateway.shared).await;

    assert!(ask_as(&authority, &gateway, Some(&revoked), &[]).await.is_none());
    assert_eq!(
        ask_as(&authority, &gateway, Some(&kept), &[]).await.unwrap().status,
        101
    );
}
