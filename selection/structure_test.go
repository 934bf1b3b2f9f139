package selection_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/selection"
	"github.com/caddygrpc/caddy-grpc-proxy/selection/selectiontest"
	"github.com/caddygrpc/caddy-grpc-proxy/upstream"
)

func init() {
	even := selectiontest.Traits{Even: true}
	policies = append(policies,
		loaded("sticky", `{"policy":"sticky","fallback":{"policy":"random"}}`, even),
		loaded("cookie", `{"policy":"cookie"}`, even),
		// Over endpoints that do not differ, the policy within is all there is.
		loaded("priority", `{"policy":"priority","child":{"policy":"random"}}`, even),
		loaded("locality", `{"policy":"locality","zone":"a","child":{"policy":"random"}}`, even),
		loaded("subset", `{"policy":"subset","match":[{"key":"v","value":"{http.request.header.v}"}],"fallback":"any","child":{"policy":"random"}}`, even),
		loaded("deterministic_subset", `{"policy":"deterministic_subset","size":2,"index":"1"}`, selectiontest.Traits{}),
	)
}

// differing builds the policy over endpoints that differ in what policies structure them by.
type differing struct{ selection.Policy }

func (d differing) Build(s *upstream.Snapshot) selection.Picker {
	t := &upstream.Snapshot{Generation: s.Generation, Endpoints: slices.Clone(s.Endpoints)}
	for i := range t.Endpoints {
		e := &t.Endpoints[i]
		e.Priority = uint32(i * 7 % 3)
		e.Locality = upstream.Locality{Region: fmt.Sprint(i * 3 % 4), Zone: fmt.Sprint(i % 2)}
		e.Metadata = map[string]string{"v": fmt.Sprint(i % 2)}
	}
	return d.Policy.Build(t)
}

// The contract holds where the structure shows too, and for one within another.
func TestStructures(t *testing.T) {
	const least = `"child":{"policy":"least_request"}`
	for name, config := range map[string]string{
		"priority":             `{"policy":"priority"}`,
		"locality":             `{"policy":"locality","region":"1","zone":"1"}`,
		"locality of keys":     `{"policy":"locality","zone":"1","child":` + hashPolicies["maglev"] + `}`,
		"deterministic subset": `{"policy":"deterministic_subset","size":3,"identity":"me"}`,
		"subset, any":          `{"policy":"subset","match":[{"key":"v","value":"9"}],"fallback":"any","child":` + hashPolicies["ring_hash"] + `}`,
		"priority, locality":   `{"policy":"priority","child":{"policy":"locality","zone":"1",` + least + `}}`,
		"sticky":               `{"policy":"sticky","fallback":{"policy":"priority"}}`,
		"ring":                 `{"policy":"ring_hash","keys":[{"source":"method"}],"balance_factor":125,"fallback":{"policy":"locality","zone":"0"}}`,
	} {
		t.Run(name, func(t *testing.T) {
			selectiontest.Run(t, func() selection.Policy { return differing{selection.WithPriorities(mustLoad(config))} }, selectiontest.Traits{})
		})
	}
}

// What each Caddyfile means, and that it loads. Words that do not begin a JSON object are part of an error.
func TestHashAndStructureCaddyfile(t *testing.T) {
	tests := []struct{ in, want string }{
		{"ring_hash header x-user", `{"keys":[{"name":"x-user","source":"header"}],"policy":"ring_hash"}`},
		{"ring_hash client_ip", `{"keys":[{"source":"client_ip"}],"policy":"ring_hash"}`},
		{
			"ring_hash {\n key header X-User terminal\n key cookie s\n key method\n min_ring_size 100\n max_ring_size 200\n balance_factor 150%\n fallback first\n}",
			`{"balance_factor":150,"fallback":{"policy":"first"},"keys":[{"name":"X-User","source":"header","terminal":true},{"name":"s","source":"cookie"},{"source":"method"}],"max_ring_size":200,"min_ring_size":100,"policy":"ring_hash"}`,
		},
		{"maglev placeholder {x} {\n table_size 251\n}", `{"keys":[{"name":"{x}","source":"placeholder"}],"policy":"maglev","table_size":251}`},
		{"maglev path {\n balance_factor 120%\n}", `{"balance_factor":120,"keys":[{"source":"path"}],"policy":"maglev"}`},
		{"rendezvous tls_san", `{"keys":[{"source":"tls_san"}],"policy":"rendezvous"}`},
		{"rendezvous query q {\n fallback ring_hash path {\n min_ring_size 10\n }\n}", `{"fallback":{"keys":[{"source":"path"}],"min_ring_size":10,"policy":"ring_hash"},"keys":[{"name":"q","source":"query"}],"policy":"rendezvous"}`},
		{"ip_hash", `{"policy":"ip_hash"}`},
		{"client_ip_hash", `{"policy":"client_ip_hash"}`},
		{"uri_hash", `{"policy":"uri_hash"}`},
		{"query user", `{"key":"user","policy":"query"}`},
		{"query user {\n fallback round_robin\n}", `{"fallback":{"policy":"round_robin"},"key":"user","policy":"query"}`},
		{"header X-User", `{"field":"X-User","policy":"header"}`},
		{"header X-User {\n fallback first\n}", `{"fallback":{"policy":"first"},"field":"X-User","policy":"header"}`},
		{"cookie", `{"policy":"cookie"}`},
		{"cookie lb", `{"name":"lb","policy":"cookie"}`},
		{"cookie lb geheim {\n fallback first\n max_age 1h\n}", `{"fallback":{"policy":"first"},"max_age":3600000000000,"name":"lb","policy":"cookie","secret":"geheim"}`},
		{"sticky", `{"policy":"sticky"}`},
		{
			"sticky {\n cookie s\n secret geheim\n max_age 12h\n path /a\n same_site strict\n secure\n fallback priority\n}",
			`{"cookie":"s","fallback":{"policy":"priority"},"max_age":43200000000000,"path":"/a","policy":"sticky","same_site":"strict","secret":"geheim","secure":true}`,
		},
		{"sticky {\n metadata x-session\n}", `{"metadata":"x-session","policy":"sticky"}`},
		{"priority", `{"policy":"priority"}`},
		{"priority {\n overprovisioning_factor 1.2\n policy random\n}", `{"child":{"policy":"random"},"overprovisioning_factor":1.2,"policy":"priority"}`},
		{
			"locality {\n region eu\n zone eu-1\n sub_zone r7\n share 20%\n overprovisioning_factor 1.5\n min_endpoints 3\n policy least_request 3\n}",
			`{"child":{"choice_count":3,"policy":"least_request"},"min_endpoints":3,"overprovisioning_factor":1.5,"policy":"locality","region":"eu","share":20,"sub_zone":"r7","zone":"eu-1"}`,
		},
		{"subset {\n match version {v}\n match stage prod\n fallback any\n max_subsets 7\n policy random\n}", `{"child":{"policy":"random"},"fallback":"any","match":[{"key":"version","value":"{v}"},{"key":"stage","value":"prod"}],"max_subsets":7,"policy":"subset"}`},
		{"subset {\n match version {v}\n fallback default {\n version 1\n }\n}", `{"default":{"version":"1"},"fallback":"default","match":[{"key":"version","value":"{v}"}],"policy":"subset"}`},
		{"deterministic_subset 20", `{"policy":"deterministic_subset","size":20}`},
		{"deterministic_subset 20 {\n index 3\n policy first\n}", `{"child":{"policy":"first"},"index":"3","policy":"deterministic_subset","size":20}`},
		{"deterministic_subset 20 {\n identity me\n}", `{"identity":"me","policy":"deterministic_subset","size":20}`},

		{"ring_hash header", "key: source header needs a name"},
		{"ring_hash heather x", `key: there is no source "heather"`},
		{"ring_hash method x", `key: unexpected argument "x"`},
		{"ring_hash header x y", `key: unexpected argument "y"`},
		{"ring_hash {\n key\n}", "key: the source is missing; it is one of header, "},
		{"ring_hash {\n min_ring_size\n}", "min_ring_size: the value is missing"},
		{"ring_hash {\n min_ring_size 0\n}", `min_ring_size: "0" is not a positive whole number`},
		{"ring_hash {\n min_ring_size 1 2\n}", `min_ring_size: unexpected argument "2"`},
		{"ring_hash {\n min_ring_size 1\n min_ring_size 2\n}", "ring_hash: min_ring_size is given twice"},
		{"ring_hash {\n ring_size 1\n}", `ring_hash: unrecognized option "ring_size"; there is balance_factor, fallback, key, max_ring_size, min_ring_size`},
		{"ring_hash {\n fallback\n}", "fallback: the name of a selection policy is missing"},
		{"ring_hash {\n fallback nope\n}", `fallback: there is no selection policy "nope"; available: `},
		{"ring_hash {\n fallback least_request 1\n}", "too few"},
		{"ip_hash x", `ip_hash: unexpected argument "x"`},
		{"header", "wrong argument count"},
		{"header x y", `header: unexpected argument "y"`},
		{"query x {\n default y\n}", `query: unrecognized option "default"; there is fallback`},
		{"cookie a b c", `cookie: unexpected argument "c"`},
		{`cookie a ""`, "cookie: the name and the secret must not be empty"},
		{"cookie {\n max_age soon\n}", `max_age: "soon" is not a positive duration; write `},
		{"sticky lb", `sticky: unexpected argument "lb"; options go into a block`},
		{"sticky {\n secret \"\"\n}", "secret: the value is empty"},
		{"sticky {\n secure yes\n}", `secure: unexpected argument "yes"`},
		{"sticky {\n max_age 0s\n}", `max_age: "0s" is not a positive duration`},
		{"priority 1.4", `priority: unexpected argument "1.4"; options go into a block`},
		{"priority {\n overprovisioning_factor high\n}", `overprovisioning_factor: "high" is not a positive number`},
		{"priority {\n policy\n}", "policy: the name of a selection policy is missing"},
		{"locality eu", `locality: unexpected argument "eu"; options go into a block`},
		{"locality {\n zone\n}", "zone: the value is missing"},
		{"subset x", `subset: unexpected argument "x"`},
		{"subset {\n match version\n}", "subset: match takes a key of the endpoints' metadata and a value"},
		{"subset {\n fallback default {\n a 1\n a 2\n }\n}", "subset: the default of a is given twice"},
		{"deterministic_subset", "deterministic_subset: the value is missing"},
		{"deterministic_subset some", `deterministic_subset: "some" is not a positive whole number`},
	}
	for _, tt := range tests {
		name := strings.Fields(tt.in)[0]
		d := caddyfile.NewTestDispenser(tt.in)
		d.Next()
		mod, err := caddyfile.UnmarshalModule(d, namespace+name)
		if !strings.HasPrefix(tt.want, "{") {
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%q: error %v, want %q", tt.in, err, tt.want)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", tt.in, err)
			continue
		}
		got := string(caddyconfig.JSONModuleObject(mod, "policy", name, nil))
		if got != tt.want {
			t.Errorf("%q:\n%s, want\n%s", tt.in, got, tt.want)
		}
		if _, err := load(t, got); err != nil {
			t.Errorf("%s: %v", got, err)
		}
	}
}

func TestHashAndStructureJSONErrors(t *testing.T) {
	t.Setenv("SELECTION_EMPTY", "")
	const key = `"keys":[{"source":"path"}]`
	for config, want := range map[string]string{
		`{"policy":"ring_hash"}`:                                                 "keys: there is nothing to hash; write key header <name>, say",
		`{"policy":"ring_hash","keys":[{"source":"header"}]}`:                    "keys: source header needs a name",
		`{"policy":"ring_hash",` + key + `,"min_ring_size":8388609}`:             "min_ring_size: 8388609 is above the largest ring, 8388608",
		`{"policy":"ring_hash",` + key + `,"max_ring_size":8388609}`:             "max_ring_size: 8388609 is above the largest ring, 8388608",
		`{"policy":"ring_hash",` + key + `,"min_ring_size":2,"max_ring_size":1}`: "min_ring_size: 2 is above max_ring_size, 1",
		`{"policy":"ring_hash",` + key + `,"min_ring_size":5000}`:                "min_ring_size: 5000 is above max_ring_size, which is 4096 by default; set that too",
		`{"policy":"ring_hash",` + key + `,"max_ring_size":1000}`:                "max_ring_size: 1000 is below min_ring_size, which is 1024 by default; set that too",
		`{"policy":"ring_hash",` + key + `,"min_ring_size":-1}`:                  "min_ring_size",
		`{"policy":"ring_hash",` + key + `,"balance_factor":99}`:                 "balance_factor: 99 is below 100 percent",
		`{"policy":"ring_hash",` + key + `,"balance_factor":-5}`:                 "balance_factor: -5 is below 100 percent",
		`{"policy":"ring_hash",` + key + `,"fallback":{"policy":"nope"}}`:        "fallback: ",
		`{"policy":"maglev"}`:                                                                                    "keys: there is nothing to hash",
		`{"policy":"maglev",` + key + `,"table_size":65536}`:                                                     "table_size: 65536 is not a prime number; the next one is 65537",
		`{"policy":"maglev",` + key + `,"table_size":1}`:                                                         "table_size: 1 is not a prime number; the next one is 2",
		`{"policy":"maglev",` + key + `,"table_size":5000077}`:                                                   "table_size: 5000077 is above the largest table, 5000011",
		`{"policy":"maglev",` + key + `,"balance_factor":50}`:                                                    "balance_factor: 50 is below 100 percent",
		`{"policy":"rendezvous","key":"x"}`:                                                                      "unknown field",
		`{"policy":"header"}`:                                                                                    "field: the metadata key is missing",
		`{"policy":"header","field":"ü"}`:                                                                        "is not a metadata key",
		`{"policy":"query"}`:                                                                                     "key: the name of the query parameter is missing",
		`{"policy":"sticky","cookie":"a b"}`:                                                                     `cookie: name "a b"`,
		`{"policy":"sticky","path":"a;b"}`:                                                                       `path "a;b"`,
		`{"policy":"sticky","cookie":"a","metadata":"b"}`:                                                        "cookie, metadata: both a and b are to carry the token; choose one",
		`{"policy":"sticky","metadata":"X-Session"}`:                                                             "metadata: keys are in lower case; write x-session",
		`{"policy":"sticky","metadata":"grpc-session"}`:                                                          "metadata: grpc-session begins with grpc-",
		`{"policy":"sticky","metadata":"session-bin"}`:                                                           `metadata: "session-bin" is binary metadata`,
		`{"policy":"sticky","metadata":"x","same_site":"lax"}`:                                                   "metadata: path, same_site and secure are for cookies",
		`{"policy":"sticky","same_site":"loose"}`:                                                                `same_site: "loose" is none of lax, strict, none`,
		`{"policy":"sticky","max_age":-1}`:                                                                       "max_age: -1ns is negative",
		`{"policy":"sticky","max_age":"10ms"}`:                                                                   "max_age: 10ms is below one second",
		`{"policy":"sticky","secret":"{env.SELECTION_EMPTY}"}`:                                                   "secret: {env.SELECTION_EMPTY} is empty; give it a value",
		`{"policy":"cookie","secret":"{env.SELECTION_EMPTY}"}`:                                                   "secret: {env.SELECTION_EMPTY} is empty; give it a value",
		`{"policy":"cookie","name":"a b"}`:                                                                       `cookie: name "a b"`,
		`{"policy":"priority","overprovisioning_factor":0.9}`:                                                    "overprovisioning_factor: 0.9 is not between 1 and 100",
		`{"policy":"priority","overprovisioning_factor":-1}`:                                                     "overprovisioning_factor: -1 is not between 1 and 100",
		`{"policy":"priority","child":{"policy":"sticky"}}`:                                                      "policy: a sticky policy cannot be within priority",
		`{"policy":"priority","child":{"policy":"nope"}}`:                                                        "policy: ",
		`{"policy":"locality"}`:                                                                                  "region, zone, sub_zone: none says where this proxy is",
		`{"policy":"locality","zone":"{env.SELECTION_EMPTY}"}`:                                                   "zone: {env.SELECTION_EMPTY} is empty",
		`{"policy":"locality","zone":"a","share":101}`:                                                           "share: 101 is not a percentage above 0",
		`{"policy":"locality","zone":"a","share":-1}`:                                                            "share: -1 is not a percentage above 0",
		`{"policy":"locality","zone":"a","min_endpoints":-1}`:                                                    "min_endpoints: -1 is negative",
		`{"policy":"locality","zone":"a","overprovisioning_factor":1000}`:                                        "overprovisioning_factor: 1000 is not between 1 and 100",
		`{"policy":"locality","zone":"a","child":{"policy":"cookie"}}`:                                           "policy: a sticky policy cannot be within locality",
		`{"policy":"subset"}`:                                                                                    "match: there is nothing to compare; write match version {header.x-version}, say",
		`{"policy":"subset","match":[{"value":"x"}]}`:                                                            "match: the key of the endpoints' metadata is empty",
		`{"policy":"subset","match":[{"key":"v"}]}`:                                                              "match: the value for v is empty",
		`{"policy":"subset","match":[{"key":"v","value":"1"},{"key":"v","value":"2"}]}`:                          "match: v is compared twice",
		`{"policy":"subset","match":[{"key":"v","value":"1"}],"fallback":"some"}`:                                `fallback: "some" is none of none, any, default`,
		`{"policy":"subset","match":[{"key":"v","value":"1"}],"default":{"v":"1"}}`:                              "default: values are for the fallback default only",
		`{"policy":"subset","match":[{"key":"v","value":"1"}],"fallback":"default"}`:                             "default: the value of v is missing",
		`{"policy":"subset","match":[{"key":"v","value":"1"}],"max_subsets":-1}`:                                 "max_subsets: -1 is negative",
		`{"policy":"subset","match":[{"key":"v","value":"{http.request.header.v-bin}"}]}`:                        "match: v: ",
		`{"policy":"deterministic_subset"}`:                                                                      "size: 0 endpoints are too few, the least is 1",
		`{"policy":"deterministic_subset","size":-2}`:                                                            "size: -2 endpoints are too few",
		`{"policy":"deterministic_subset","size":2,"index":"x"}`:                                                 `index: x is "x", not the number of a proxy`,
		`{"policy":"deterministic_subset","size":2,"index":"{env.SELECTION_EMPTY}"}`:                             `index: {env.SELECTION_EMPTY} is "", not the number of a proxy`,
		`{"policy":"deterministic_subset","size":2,"index":"1","identity":"x"}`:                                  "index, identity: both 1 and x tell this proxy from others; choose one",
		`{"policy":"deterministic_subset","size":2,"identity":"{env.SELECTION_EMPTY}"}`:                          "identity: {env.SELECTION_EMPTY} is empty",
		`{"policy":"subset","match":[{"key":"v","value":"1"}],"fallback":"default","default":{"v":"1","w":"2"}}`: "default: w is in no match",
	} {
		if p, err := load(t, config); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v; want %q", config, p, err, want)
		}
	}
}

// A sticky policy is refused, at any depth, within one that would choose among endpoints before it.
func TestStickyIsOutermost(t *testing.T) {
	subset := func(child string) string {
		return `{"policy":"subset","match":[{"key":"v","value":"1"}],"child":` + child + `}`
	}
	const sticky, cookie = `{"policy":"sticky"}`, `{"policy":"cookie"}`
	for _, tt := range []struct{ config, want string }{
		{`{"policy":"priority","child":` + subset(sticky) + `}`, "policy: a sticky policy cannot be within priority"},
		{`{"policy":"priority","child":{"policy":"ip_hash"}}`, ""},
		{
			`{"policy":"priority","child":{"policy":"header","field":"k","fallback":` + cookie + `}}`,
			"policy: a sticky policy cannot be within priority, which would choose among endpoints before it; write priority as the fallback of the sticky policy",
		},
		{`{"policy":"locality","zone":"a","child":` + subset(subset(sticky)) + `}`, "policy: a sticky policy cannot be within locality"},
		{`{"policy":"locality","zone":"a","child":` + subset(`{"policy":"random"}`) + `}`, ""},
		{`{"policy":"deterministic_subset","size":3,"child":` + sticky + `}`, "policy: a sticky policy cannot be within deterministic_subset"},
		{`{"policy":"sticky","fallback":` + subset(cookie) + `}`, "fallback: a sticky policy within a sticky policy"},
		{`{"policy":"sticky","fallback":{"policy":"deterministic_subset","size":3}}`, ""},
		{subset(sticky), ""},
	} {
		_, err := load(t, tt.config)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v; want %q", tt.config, err, tt.want)
		}
	}
}
