package discovery

import "testing"

func TestStatic(t *testing.T) {
	t.Setenv("STATIC_HOST", "10.0.0.9")
	two := 2
	s := &Static{Endpoints: []Entry{
		{Address: "10.0.0.1:50051-50052", Weight: &two, Metadata: map[string]string{"stage": "canary"}},
		{Address: "{env.STATIC_HOST}:50051", Priority: 1},
	}}
	watch(t, s).awaitList(
		t, "10.0.0.1:50051,w=2,map[stage:canary]", "10.0.0.1:50052,w=2,map[stage:canary]", "10.0.0.9:50051,p=1",
	)
	if s.Endpoints[1].Address != "{env.STATIC_HOST}:50051" {
		t.Error("provisioning changes the configuration")
	}
}

func TestStaticRefused(t *testing.T) {
	none, many := 0, 65_536
	refused(t, &Static{}, "endpoints is empty")
	refused(t, &Static{Endpoints: []Entry{{Address: "a:1"}, {}}}, "endpoints[1]: address is missing")
	refused(t, &Static{Endpoints: []Entry{{Address: "a:1", Weight: &none}}}, "endpoints[0]: weight is 0")
	refused(t, &Static{Endpoints: []Entry{{Address: "a:1", Weight: &many}}}, "endpoints[0]: weight is 65536")
	refused(t, &Static{Endpoints: []Entry{{Address: "{http.request.host}:1"}}}, "placeholder that is not known")
	refused(t, &Static{Endpoints: []Entry{{Address: "h2c://a:1"}}}, "has a scheme")
}

func TestStaticCaddyfile(t *testing.T) {
	runCaddyfile(t, []caddyfileCase{
		{input: "static a:1 b:2", json: `{"endpoints":[{"address":"a:1"},{"address":"b:2"}]}`},
		{input: `static a:1 {
			endpoint b:1 c:1 {
				name b.example.com
				weight 3
				priority 1
				locality eu eu-1 b
				metadata stage canary
				metadata hash_key "x y"
			}
			endpoint d:1
		}`, json: `{"endpoints":[{"address":"a:1"},` +
			`{"address":"b:1","name":"b.example.com","weight":3,"priority":1,"locality":{"region":"eu","zone":"eu-1","sub_zone":"b"},"metadata":{"hash_key":"x y","stage":"canary"}},` +
			`{"address":"c:1","name":"b.example.com","weight":3,"priority":1,"locality":{"region":"eu","zone":"eu-1","sub_zone":"b"},"metadata":{"hash_key":"x y","stage":"canary"}},` +
			`{"address":"d:1"}]}`},
		{input: "static {\n host a:1\n}", err: `unrecognized subdirective "host"; expected endpoint`},
		{input: "static {\n endpoint\n}", err: "wrong argument count"},
		{input: "static {\n endpoint a:1 {\n wight 1\n}\n}", err: `unrecognized subdirective "wight"`},
		{input: "static {\n endpoint a:1 {\n weight 0\n}\n}", err: "weight is 0"},
		{input: "static {\n endpoint a:1 {\n weight many\n}\n}", err: `weight: "many" is not a whole number`},
		{input: "static {\n endpoint a:1 {\n weight 1\n weight 2\n}\n}", err: "weight is given twice"},
		{input: "static {\n endpoint a:1 {\n name\n}\n}", err: "wrong argument count"},
		{input: "static {\n endpoint a:1 {\n name b:1\n}\n}", err: `name "b:1" is not a host name`},
		{input: "static {\n endpoint a:1 {\n metadata x\n}\n}", err: "wrong argument count"},
		{input: "static {\n endpoint a:1 {\n metadata x 1\n metadata x 2\n}\n}", err: "metadata x is given twice"},
		{input: "static {\n endpoint a:1 {\n locality a b c d\n}\n}", err: "wrong argument count"},
		{input: "static {\n endpoint a:1 {\n locality a\n locality b\n}\n}", err: "locality is given twice"},
	})
}
