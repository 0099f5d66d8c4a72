//! The page of the records that a run writes.

use super::{
    markdown::{Page, code, inline},
    schema::{SchemaRoot, description, is_nullable},
};
use crate::{
    config_diff::ChangeRecord, launcher::engine::restart_record::RestartRecord,
    registry::KeeperRegistry,
};
use dataset::info::DatasetInfo;
use serde_json::Value;
use trainer::{DroppedLines, RankLine, RoutingLine, StepMetrics, ValidationMetrics};

const INTRODUCTION: &str = "\
A run writes these files into its folder `run.dir`. Files that end in `.jsonl` have one JSON \
object per line. A resumed run appends to them, and removes the lines of steps that it repeats. \
A record of `dropped_lines` stands for lines that the disk did not take in time. \
A key marked *optional* is left out if it does not apply.";

const OTHER_FILES: [OtherFile; 7] = [
    OtherFile {
        path: "checkpoints/step-N/",
        content: "A checkpoint: `manifest.json` and safetensors shards.",
    },
    OtherFile {
        path: "tokenizer.json",
        content: "A copy of the data's tokenizer, for `moerun generate`.",
    },
    OtherFile {
        path: "logs/rank-N.log",
        content: "The log of a rank.",
    },
    OtherFile {
        path: "logs/keeper-N.log",
        content: "The log of a keeper.",
    },
    OtherFile {
        path: "logs/rank-N.flight.json",
        content: "The flight recorder: a rank's last collective calls, written when one fails.",
    },
    OtherFile {
        path: "logs/rank-N.trace.json",
        content: "The trace of step `run.trace_step`, for <https://ui.perfetto.dev>.",
    },
    OtherFile {
        path: "lock",
        content: "Locked while a launcher uses the folder.",
    },
];

/// A file that has no records.
struct OtherFile {
    path: &'static str,
    content: &'static str,
}

/// A kind of record in a file.
struct Record {
    file: &'static str,
    writer: &'static str,
    schema: SchemaRoot,
}

pub(super) fn page() -> String {
    let mut page = Page::new("Metrics and records", "the record types");
    page.paragraphs(INTRODUCTION);
    let records = records();
    let row = |record: &Record| {
        vec![
            code(record.file),
            record.writer.to_string(),
            inline(description(record.schema.root())),
        ]
    };
    let rows: Vec<_> = records.iter().map(row).collect();
    page.table(&["file", "written by", "content"], &rows);
    let mut last_file = "";
    for record in &records {
        if record.file != last_file {
            page.heading(2, &code(record.file));
        }
        last_file = record.file;
        page.paragraphs(description(record.schema.root()));
        let mut rows = Vec::new();
        add_rows(&record.schema, "", record.schema.root(), &mut rows);
        page.table(&["key", "type", "meaning"], &rows);
    }
    page.heading(2, "Other files");
    let row = |file: &OtherFile| vec![code(file.path), inline(file.content)];
    let rows: Vec<_> = OTHER_FILES.iter().map(row).collect();
    page.table(&["file", "content"], &rows);
    page.into_text()
}

fn records() -> Vec<Record> {
    let rank0 = "rank 0";
    let launcher = "the launcher";
    vec![
        Record {
            file: "metrics.jsonl",
            writer: rank0,
            schema: SchemaRoot::of_output::<StepMetrics>(),
        },
        Record {
            file: "metrics.jsonl",
            writer: rank0,
            schema: SchemaRoot::of_output::<ValidationMetrics>(),
        },
        Record {
            file: "metrics.jsonl",
            writer: rank0,
            schema: SchemaRoot::of_output::<DroppedLines>(),
        },
        Record {
            file: "routing.jsonl",
            writer: rank0,
            schema: SchemaRoot::of_output::<RoutingLine>(),
        },
        Record {
            file: "routing.jsonl",
            writer: rank0,
            schema: SchemaRoot::of_output::<DroppedLines>(),
        },
        Record {
            file: "ranks.jsonl",
            writer: rank0,
            schema: SchemaRoot::of_output::<RankLine>(),
        },
        Record {
            file: "ranks.jsonl",
            writer: rank0,
            schema: SchemaRoot::of_output::<DroppedLines>(),
        },
        Record {
            file: "restarts.jsonl",
            writer: launcher,
            schema: SchemaRoot::of_output::<RestartRecord>(),
        },
        Record {
            file: "restarts.jsonl",
            writer: rank0,
            schema: SchemaRoot::of_output::<ChangeRecord>(),
        },
        Record {
            file: "keepers.json",
            writer: launcher,
            schema: SchemaRoot::of_output::<KeeperRegistry>(),
        },
        Record {
            file: "dataset.json",
            writer: "`moerun data prepare`, in the folder of the data",
            schema: SchemaRoot::of_output::<DatasetInfo>(),
        },
    ]
}

/// Adds a row for each key of an object and of the objects in it.
fn add_rows(schema: &SchemaRoot, prefix: &str, node: &Value, rows: &mut Vec<Vec<String>>) {
    for field in schema.fields(node) {
        let resolved = schema.resolve(field.schema);
        let entries = &resolved["items"];
        let path = format!("{prefix}{}", field.name);
        let is_object = !schema.fields(resolved).is_empty();
        let is_list_of_objects = !schema.fields(entries).is_empty();
        let kind = if is_object {
            "object".to_string()
        } else if is_list_of_objects {
            "list of objects".to_string()
        } else {
            schema.type_name(resolved)
        };
        let optional = match (field.required, is_nullable(resolved)) {
            (false, _) => ", optional",
            (true, true) => " or null",
            (true, false) => "",
        };
        rows.push(vec![
            code(&path),
            format!("{kind}{optional}"),
            inline(description(field.schema)),
        ]);
        if is_object {
            add_rows(schema, &format!("{path}."), resolved, rows);
        } else if is_list_of_objects {
            add_rows(schema, &format!("{path}[]."), entries, rows);
        }
    }
}
