//! `POST /devices/import`: a file of devices, streamed into one transaction.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    body::{Body, BodyDataStream},
    extract::State,
    http::{HeaderMap, StatusCode, header},
};
use bytes::Bytes;
use futures_util::StreamExt as _;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    Api,
    auth::{Admin, Caller},
    csv::DeviceLines,
    extract::Params,
    problem::{Code, Problem, ProblemBody},
};
use crate::store::{Import, ImportLine, OnOtherCredential};

/// Maximum size of a file, in bytes: a million of the longest lines. Then 413.
pub const IMPORT_BYTES_MAX: u64 = 512 << 20;
/// Number of lines that are passed to the database at once.
const BATCH_LEN: usize = 1_000;

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(import_devices))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ImportParams {
    /// Give registered devices the file's credential, and its name if they have none. Default: the line of a registered
    /// device with another credential is bad.
    #[serde(default)]
    #[param(required = false)]
    update: bool,
}

/// The result of an import.
#[derive(Debug, Serialize, ToSchema)]
pub struct ImportAnswer {
    added: u64,
    /// Devices that got another credential, or a name that they did not have.
    updated: u64,
    /// Devices that were registered with the same credential.
    skipped: u64,
}

/// A bad line.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct BadLine {
    /// Its number; the header is line 1.
    number: u64,
    reason: String,
}

/// Register the devices of a CSV file, all of them or none
///
/// The first line is the header: `id` and `secret` (16 to 128 bytes of visible ASCII) or `secret_sha256` (64
/// hexadecimal digits), and optionally `tenant` and `model`, in any letter case. `id` is a UUID, or with
/// `identity.namespace` the device's name. Fields are separated by commas, semicolons or tabs. The text is UTF-8, or
/// UTF-16 with a byte order mark. At most 1,000,000 lines. If any line is bad, nothing is imported, and the first 100
/// bad lines are named.
#[utoipa::path(
    post, path = "/api/v1/devices/import", tag = "devices", params(ImportParams),
    request_body(content = String, content_type = "text/csv"),
    responses(
        (status = 200, description = "Every device of the file was registered", body = ImportAnswer),
        (status = 201, description = "Imported, and at least one device is new", body = ImportAnswer),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn import_devices(
    caller: Caller<Admin>,
    State(api): State<Arc<Api>>,
    Params(params): Params<ImportParams>,
    headers: HeaderMap,
    body: Body,
) -> Result<(StatusCode, Json<ImportAnswer>), Problem> {
    if !is_csv(&headers) {
        let detail = "expected Content-Type: text/csv";
        return Err(Problem::new(Code::UnsupportedMediaType, detail));
    }
    let pieces = Pieces {
        stream: body.into_data_stream(),
        wait_max: api.request_timeout(),
        taken: 0,
    };
    let import = take(&api, params, pieces).await?;
    // A file may take minutes to arrive.
    if !caller.is_allowed(&api.state.tokens) {
        return Err(Problem::new(
            Code::Unauthorized,
            "the token was revoked during the upload",
        ));
    }
    let audit = caller.audit(&api, "device.import");
    let state = Arc::clone(&api.state);
    let report = api
        .carry_out(async move {
            let report = import.finish(&audit).await;
            // Even after an error: the import may have been made nevertheless.
            state.lookups.forget_all();
            state.registry_index_wanted.ask();
            state.registered.ask();
            if let Err(error) = state.resume.poll(&state.store, &state.clock).await {
                tracing::warn!(%error, "revocations of the import not read yet");
            }
            report
        })
        .await??;
    if report.bad > 0 {
        let named = report.bad_lines.into_iter().map(|line| BadLine {
            number: line.number,
            reason: line.reason,
        });
        return Err(Problem::bad_lines(report.bad, named.collect()));
    }
    tracing::info!(
        added = report.added,
        updated = report.updated,
        skipped = report.skipped,
        "devices imported"
    );
    let status = if report.added > 0 {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    let answer = ImportAnswer {
        added: report.added,
        updated: report.updated,
        skipped: report.skipped,
    };
    Ok((status, Json(answer)))
}

/// Reads the file. Dropping the future imports nothing.
async fn take(api: &Api, params: ImportParams, mut pieces: Pieces) -> Result<Import, Problem> {
    let on_other_credential = if params.update {
        OnOtherCredential::Update
    } else {
        OnOtherCredential::Refuse
    };
    let mut import = api.state.store.import(on_other_credential).await?;
    let mut reader = DeviceLines::new(api.state.config.identity.clone());
    let mut lines: Vec<ImportLine> = Vec::new();
    let bad_header = |error: super::csv::BadHeader| Problem::invalid(error.to_string());
    while let Some(piece) = pieces.next().await? {
        reader.feed(&piece, &mut lines).map_err(bad_header)?;
        if lines.len() >= BATCH_LEN {
            import.push(std::mem::take(&mut lines)).await?;
        }
    }
    reader.finish(&mut lines).map_err(bad_header)?;
    import.push(lines).await?;
    Ok(import)
}

/// A body as it arrives, with a maximum size and a maximum time between two pieces.
struct Pieces {
    stream: BodyDataStream,
    wait_max: Duration,
    taken: u64,
}

impl Pieces {
    async fn next(&mut self) -> Result<Option<Bytes>, Problem> {
        match timeout(self.wait_max, self.stream.next()).await {
            Ok(Some(Ok(piece))) => {
                self.taken += piece.len() as u64;
                if self.taken > IMPORT_BYTES_MAX {
                    return Err(Problem::new(
                        Code::TooLarge,
                        format!("the file is over {IMPORT_BYTES_MAX} bytes: import it in parts"),
                    ));
                }
                Ok(Some(piece))
            }
            Ok(Some(Err(_))) => Err(Problem::new(Code::BadRequest, "the upload was cut off")),
            Ok(None) => Ok(None),
            Err(_) => Err(Problem::new(Code::TimedOut, "the upload stalled")),
        }
    }
}

fn is_csv(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.split(';').next())
        .is_some_and(|media_type| media_type.trim().eq_ignore_ascii_case("text/csv"))
}
