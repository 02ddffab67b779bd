PRAGMA application_id = 1952540515;
PRAGMA user_version = 5;
BEGIN TRANSACTION;
CREATE TABLE changes (
            id INTEGER PRIMARY KEY, change_id TEXT NOT NULL UNIQUE, policy TEXT NOT NULL, account_id TEXT NOT NULL,
            region TEXT NOT NULL, instance_id TEXT NOT NULL, tag_key TEXT NOT NULL, former TEXT, value TEXT,
            why TEXT NOT NULL, who TEXT NOT NULL, changed_at TEXT NOT NULL,
            status TEXT NOT NULL CHECK (status IN ('intended', 'written'))
        );
CREATE TABLE coverage (
            scan INTEGER NOT NULL REFERENCES scans (id), account_id TEXT NOT NULL, region TEXT NOT NULL,
            status TEXT NOT NULL CHECK (status IN ('read', 'unread')), error_code TEXT, error_message TEXT,
            instances INTEGER NOT NULL, compliant INTEGER NOT NULL, findings INTEGER NOT NULL,
            exempted INTEGER NOT NULL, new INTEGER NOT NULL, repeat INTEGER NOT NULL, reopened INTEGER NOT NULL,
            resolved INTEGER NOT NULL, PRIMARY KEY (scan, account_id, region)
        ) WITHOUT ROWID
        ;
INSERT INTO "coverage" VALUES(2,'123456789012','eu-west-1','read',NULL,NULL,2,0,2,0,0,2,0,0);
INSERT INTO "coverage" VALUES(3,'123456789012','us-east-1','read',NULL,NULL,3,2,1,0,0,1,0,1);
INSERT INTO "coverage" VALUES(4,'123456789012','eu-west-1','read',NULL,NULL,1,0,1,0,1,0,0,0);
INSERT INTO "coverage" VALUES(4,'123456789012','us-east-1','read',NULL,NULL,1,0,1,0,1,0,0,0);
INSERT INTO "coverage" VALUES(5,'123456789012','eu-west-1','read',NULL,NULL,1,0,1,0,0,1,0,1);
INSERT INTO "coverage" VALUES(5,'123456789012','us-east-1','read',NULL,NULL,3,1,2,0,0,1,1,0);
INSERT INTO "coverage" VALUES(6,'123456789012','eu-west-1','unread','NotInFiles','no instance of this region is in the files; if there is none, say so with --region',0,0,0,0,0,0,0,0);
INSERT INTO "coverage" VALUES(6,'123456789012','us-east-1','read',NULL,NULL,3,3,0,0,0,0,0,2);
INSERT INTO "coverage" VALUES(7,'123456789012','eu-west-1','unread','NotInFiles','no instance of this region is in the files; if there is none, say so with --region',0,0,0,0,0,0,0,0);
INSERT INTO "coverage" VALUES(7,'123456789012','us-east-1','read',NULL,NULL,3,2,1,0,0,0,1,0);
INSERT INTO "coverage" VALUES(8,'123456789012','eu-west-1','read',NULL,NULL,1,1,0,0,0,0,0,1);
INSERT INTO "coverage" VALUES(9,'123456789012','eu-west-1','read',NULL,NULL,1,0,1,0,0,0,1,0);
INSERT INTO "coverage" VALUES(9,'123456789012','us-east-1','read',NULL,NULL,3,1,2,0,0,1,1,0);
INSERT INTO "coverage" VALUES(10,'123456789012','eu-west-1','unread','NotInFiles','no instance of this region is in the files; if there is none, say so with --region',0,0,0,0,0,0,0,0);
INSERT INTO "coverage" VALUES(10,'123456789012','us-east-1','read',NULL,NULL,3,2,1,0,0,1,0,1);
CREATE TABLE events (
            id INTEGER PRIMARY KEY, finding INTEGER NOT NULL REFERENCES findings (id), at TEXT NOT NULL,
            event TEXT NOT NULL CHECK (event IN ('CHANGED', 'RESOLVED', 'REOPENED')), before TEXT, resolution TEXT
        );
INSERT INTO "events" VALUES(1,4,'2026-03-01T10:48:00Z','RESOLVED','[{"tag_key":"Owner","type":"missing","value":null,"found_key":null,"message":"Owner is missing"},{"tag_key":"Project","type":"missing","value":null,"found_key":null,"message":"Project is missing"}]','tagged');
INSERT INTO "events" VALUES(2,2,'2026-03-11T06:00:00Z','RESOLVED','[{"tag_key":"Owner","type":"missing","value":null,"found_key":null,"message":"Owner is missing"},{"tag_key":"Project","type":"missing","value":null,"found_key":null,"message":"Project is missing"}]','gone');
INSERT INTO "events" VALUES(3,3,'2026-03-11T06:00:00Z','CHANGED','[{"tag_key":"Owner","type":"missing","value":null,"found_key":null,"message":"Owner is missing"},{"tag_key":"Project","type":"missing","value":null,"found_key":null,"message":"Project is missing"}]',NULL);
INSERT INTO "events" VALUES(4,4,'2026-03-11T06:00:00Z','REOPENED',NULL,NULL);
INSERT INTO "events" VALUES(5,3,'2026-03-21T06:00:00Z','RESOLVED','[{"tag_key":"Project","type":"missing","value":null,"found_key":null,"message":"Project is missing"}]','tagged');
INSERT INTO "events" VALUES(6,4,'2026-03-21T06:00:00Z','RESOLVED','[{"tag_key":"Owner","type":"missing","value":null,"found_key":null,"message":"Owner is missing"}]','tagged');
INSERT INTO "events" VALUES(7,3,'2026-03-31T06:00:00Z','REOPENED',NULL,NULL);
INSERT INTO "events" VALUES(8,1,'2026-03-31T18:00:00Z','RESOLVED','[{"tag_key":"Project","type":"missing","value":null,"found_key":null,"message":"Project is missing"}]','tagged');
INSERT INTO "events" VALUES(9,3,'2026-04-10T06:00:00Z','CHANGED','[{"tag_key":"Project","type":"missing","value":null,"found_key":null,"message":"Project is missing"}]',NULL);
INSERT INTO "events" VALUES(10,1,'2026-04-10T06:00:00Z','REOPENED',NULL,NULL);
INSERT INTO "events" VALUES(11,4,'2026-04-10T06:00:00Z','REOPENED',NULL,NULL);
INSERT INTO "events" VALUES(12,4,'2026-04-11T06:00:00Z','RESOLVED','[{"tag_key":"Owner","type":"missing","value":null,"found_key":null,"message":"Owner is missing"},{"tag_key":"Project","type":"missing","value":null,"found_key":null,"message":"Project is missing"}]','tagged');
CREATE TABLE findings (
            id INTEGER PRIMARY KEY, policy TEXT NOT NULL, account_id TEXT NOT NULL, region TEXT NOT NULL,
            instance_id TEXT NOT NULL, state TEXT NOT NULL, launch_time TEXT NOT NULL, tags TEXT NOT NULL,
            violations TEXT NOT NULL, last_scan INTEGER NOT NULL REFERENCES scans (id),
            status TEXT NOT NULL CHECK (status IN ('NEW', 'REPEAT', 'REOPENED', 'RESOLVED')),
            first_seen TEXT NOT NULL, last_seen TEXT NOT NULL, times_seen INTEGER NOT NULL,
            times_reopened INTEGER NOT NULL, resolved_at TEXT, resolution TEXT, created_by TEXT, suggestions TEXT, tag_keys TEXT, instance_type TEXT, cause_kind TEXT, cause TEXT, monthly_cost REAL, managed_by TEXT,
            UNIQUE (policy, account_id, region, instance_id)
        );
INSERT INTO "findings" VALUES(1,'test','123456789012','eu-west-1','i-00000000000000003','running','2026-01-01T00:00:00Z','{}','[{"tag_key":"Owner","type":"missing","value":null,"found_key":null,"message":"Owner is missing"},{"tag_key":"Project","type":"missing","value":null,"found_key":null,"message":"Project is missing"}]',9,'REOPENED','2026-03-01T06:00:00Z','2026-04-10T06:00:00Z',4,1,NULL,NULL,'Unknown (a person)',NULL,'["Owner","Project"]','',NULL,NULL,NULL,'');
INSERT INTO "findings" VALUES(2,'test','123456789012','eu-west-1','i-00000000000000004','running','2026-01-01T00:00:00Z','{}','[{"tag_key":"Owner","type":"missing","value":null,"found_key":null,"message":"Owner is missing"},{"tag_key":"Project","type":"missing","value":null,"found_key":null,"message":"Project is missing"}]',5,'RESOLVED','2026-03-01T06:00:00Z','2026-03-01T08:24:00Z',2,0,'2026-03-11T06:00:00Z','gone',NULL,NULL,'["Owner","Project"]','',NULL,NULL,NULL,'');
INSERT INTO "findings" VALUES(3,'test','123456789012','us-east-1','i-00000000000000001','running','2026-01-01T00:00:00Z','{}','[{"tag_key":"Owner","type":"missing","value":null,"found_key":null,"message":"Owner is missing"},{"tag_key":"Project","type":"missing","value":null,"found_key":null,"message":"Project is missing"}]',10,'REPEAT','2026-03-01T06:00:00Z','2026-04-11T06:00:00Z',7,1,NULL,NULL,'ann',NULL,'["Owner","Project"]','',NULL,NULL,NULL,'');
INSERT INTO "findings" VALUES(4,'test','123456789012','us-east-1','i-00000000000000002','running','2026-01-01T00:00:00Z','{}','[{"tag_key":"Owner","type":"missing","value":null,"found_key":null,"message":"Owner is missing"},{"tag_key":"Project","type":"missing","value":null,"found_key":null,"message":"Project is missing"}]',10,'RESOLVED','2026-03-01T08:24:00Z','2026-04-10T06:00:00Z',3,2,'2026-04-11T06:00:00Z','tagged','unknown (launched more than 90 days ago)',NULL,'["Owner","Project"]','',NULL,NULL,NULL,'');
INSERT INTO "findings" VALUES(5,'other','123456789012','eu-west-1','i-00000000000000006','running','2026-01-01T00:00:00Z','{}','[{"tag_key":"Owner","type":"missing","value":null,"found_key":null,"message":"Owner is missing"},{"tag_key":"Project","type":"missing","value":null,"found_key":null,"message":"Project is missing"}]',4,'NEW','2026-03-02T06:00:00Z','2026-03-02T06:00:00Z',1,0,NULL,NULL,NULL,NULL,'["Owner","Project"]','',NULL,NULL,NULL,'');
INSERT INTO "findings" VALUES(6,'other','123456789012','us-east-1','i-00000000000000005','running','2026-01-01T00:00:00Z','{}','[{"tag_key":"Owner","type":"missing","value":null,"found_key":null,"message":"Owner is missing"},{"tag_key":"Project","type":"missing","value":null,"found_key":null,"message":"Project is missing"}]',4,'NEW','2026-03-02T06:00:00Z','2026-03-02T06:00:00Z',1,0,NULL,NULL,NULL,NULL,'["Owner","Project"]','',NULL,NULL,NULL,'');
CREATE TABLE notifications (
            policy TEXT NOT NULL, subject TEXT NOT NULL, channel TEXT NOT NULL, told_at TEXT,
            PRIMARY KEY (policy, subject, channel)
        ) WITHOUT ROWID
        ;
CREATE TABLE scans (
            id INTEGER PRIMARY KEY, scan_id TEXT NOT NULL UNIQUE, policy TEXT NOT NULL, policy_file TEXT NOT NULL,
            policy_digest TEXT NOT NULL, started_at TEXT NOT NULL, finished_at TEXT NOT NULL
        );
INSERT INTO "scans" VALUES(2,'b7e46cf1-b862-4a66-8800-7147b0805652','test','policy.yaml','e0ffaf87e4fb7b0aa4b69e50825125635406cf45e2a59209e55c31cf4c47b9ee','2026-03-01T08:24:00Z','2026-03-01T08:24:00Z');
INSERT INTO "scans" VALUES(3,'f3d8d88a-81f8-474d-ac24-dfe6967b2208','test','policy.yaml','e0ffaf87e4fb7b0aa4b69e50825125635406cf45e2a59209e55c31cf4c47b9ee','2026-03-01T10:48:00Z','2026-03-01T10:48:00Z');
INSERT INTO "scans" VALUES(4,'970f7f5e-8697-4736-bb06-40b94fb05519','other','policy.yaml','c825117b35f126a4db0ef64a151345e0f38e2723ace673fdfd456044e63c447b','2026-03-02T06:00:00Z','2026-03-02T06:00:00Z');
INSERT INTO "scans" VALUES(5,'db35ff87-b382-4295-ad40-573634319857','test','policy.yaml','e0ffaf87e4fb7b0aa4b69e50825125635406cf45e2a59209e55c31cf4c47b9ee','2026-03-11T06:00:00Z','2026-03-11T06:00:00Z');
INSERT INTO "scans" VALUES(6,'2bc36b44-ed61-43da-b8c2-2ce4ed97d77a','test','policy.yaml','e0ffaf87e4fb7b0aa4b69e50825125635406cf45e2a59209e55c31cf4c47b9ee','2026-03-21T06:00:00Z','2026-03-21T06:00:00Z');
INSERT INTO "scans" VALUES(7,'160ee0d9-dacb-45ef-87a5-bd06241424e6','test','policy.yaml','e0ffaf87e4fb7b0aa4b69e50825125635406cf45e2a59209e55c31cf4c47b9ee','2026-03-31T06:00:00Z','2026-03-31T06:00:00Z');
INSERT INTO "scans" VALUES(8,'69e18723-61fa-4ccf-a255-a1334f1be0b2','test','policy.yaml','e0ffaf87e4fb7b0aa4b69e50825125635406cf45e2a59209e55c31cf4c47b9ee','2026-03-31T18:00:00Z','2026-03-31T18:00:00Z');
INSERT INTO "scans" VALUES(9,'32bb8616-337e-4e3a-bd08-01f5107be3bf','test','policy.yaml','e0ffaf87e4fb7b0aa4b69e50825125635406cf45e2a59209e55c31cf4c47b9ee','2026-04-10T06:00:00Z','2026-04-10T06:00:00Z');
INSERT INTO "scans" VALUES(10,'7899f41a-9cc1-47eb-85ec-e2ceeda8f284','test','policy.yaml','e0ffaf87e4fb7b0aa4b69e50825125635406cf45e2a59209e55c31cf4c47b9ee','2026-04-11T06:00:00Z','2026-04-11T06:00:00Z');
CREATE TABLE trend (
            policy TEXT NOT NULL, day TEXT NOT NULL, at TEXT NOT NULL, open INTEGER NOT NULL, new INTEGER NOT NULL,
            reopened INTEGER NOT NULL, resolved INTEGER NOT NULL, targets INTEGER NOT NULL,
            targets_unread INTEGER NOT NULL, PRIMARY KEY (policy, day)
        ) WITHOUT ROWID
        ;
INSERT INTO "trend" VALUES('other','2026-03-02','2026-03-02T06:00:00Z',2,2,0,0,2,0);
INSERT INTO "trend" VALUES('test','2026-03-01','2026-03-01T10:48:00Z',3,4,0,1,2,1);
CREATE INDEX events_of ON events (finding);
CREATE INDEX changes_of ON changes (policy, account_id, region, instance_id);
COMMIT;
